"""The safetensors header: a strict parser, compiled, and one error class for each rule."""

from __future__ import annotations

from mxcore.safetensors.errors import SafetensorsError
from mxcore.safetensors.file_stamp import FileStamp, is_changed, stamp_of
from mxcore.safetensors.header import Header, parse_header, read_header

__all__ = ["FileStamp", "Header", "SafetensorsError", "is_changed", "parse_header", "read_header", "stamp_of"]
