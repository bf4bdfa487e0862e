"""The safetensors header: a strict parser, compiled, and one error class for each rule."""

from __future__ import annotations

from mxcore.safetensors.errors import SafetensorsError
from mxcore.safetensors.header import Header, parse_header, read_header

__all__ = ["Header", "SafetensorsError", "parse_header", "read_header"]
