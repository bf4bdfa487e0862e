"""FileChunk messages whose data is read straight into the message: no copy between the file and gRPC.

A message's fields may come in any order (protobuf, "Encoding: Field Order"), so the data field goes last.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import cast

import xxhash

_DATA_TAG = b"\x12"  # FileChunk.data: field 2, length-delimited
_DIGEST_TAG = b"\xc9\x3e"  # FileChunk.data_digest: field 1001, 64 bits
_DIGEST_BYTES = 8

# https://docs.python.org/3/c-api/bytes.html: with NULL, a bytes object whose contents may still be written.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.argtypes = (ctypes.py_object,)
_address_of.restype = ctypes.c_void_p


class FileTooShort(OSError):
    """The file ended before the range did: it was truncated."""


def chunk_message(fields: bytes, handle: int, offset: int, length: int, *, with_digest: bool = False) -> bytes:
    """A serialised FileChunk: `fields` (serialised, without data), the digest of the data if requested, then `length`
    bytes of the file from `offset`.

    Raises:
        FileTooShort: the file has fewer bytes.
        OSError: it cannot be read.
    """
    digest = _DIGEST_TAG + bytes(_DIGEST_BYTES) if with_digest else b""
    head = fields + digest + (_DATA_TAG + _varint(length) if length else b"")
    message = cast("bytes", _new_bytes(None, len(head) + length))
    memory = memoryview((ctypes.c_char * len(message)).from_address(_address_of(message))).cast("B")
    memory[: len(head)] = head
    data = rest = memory[len(head) :]
    while rest:
        count = os.preadv(handle, [rest], offset)
        if not count:
            raise FileTooShort(f"it ends at byte {offset}")
        rest, offset = rest[count:], offset + count
    if with_digest:
        struct.pack_into("<Q", memory, len(fields) + len(_DIGEST_TAG), xxhash.xxh3_64_intdigest(data))
    return message


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
