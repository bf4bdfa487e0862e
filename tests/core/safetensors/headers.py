"""Safetensors files for tests, from text or from a dictionary."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from mxcore.safetensors import Header, parse_header


def file_of(header: bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    """A whole file with that header, whatever is in it."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(header: bytes | Mapping[str, object], data: bytes = b"") -> Header:
    file = file_of(header, data)
    return parse_header(file, len(file), file="t.safetensors")


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
