"""Taking a serialised FileChunk apart without copying its data."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from mxserver.wire import model_pb2

_DATA_FIELD = 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class BadMessage(ValueError):
    """Bytes that are no protobuf message."""


def split_chunk(message: bytes) -> tuple[model_pb2.FileChunk, memoryview]:
    """The chunk's fields without its data, and the data as a view of `message`. Raises BadMessage.

    The encoding is https://protobuf.dev/programming-guides/encoding/; the last of several values of a field counts.
    """
    view = memoryview(message)
    fields = bytearray()
    data = view[:0]
    at = 0
    while at < len(message):
        begin = at
        tag, at = _varint(message, at)
        length, at = _field_length(message, tag & 7, at)
        if at + length > len(message):
            raise BadMessage(f"field {tag >> 3} is cut at byte {len(message)}")
        if tag == _DATA_FIELD << 3 | _LENGTH:
            data = view[at : at + length]
        else:
            fields += view[begin : at + length]
        at += length
    try:
        return model_pb2.FileChunk.FromString(bytes(fields)), data
    except DecodeError as error:
        raise BadMessage(str(error)) from error


def _field_length(message: bytes, kind: int, at: int) -> tuple[int, int]:
    """The bytes of a field's value, and where it begins."""
    if kind == _VARINT:
        return _varint(message, at)[1] - at, at
    if kind == _LENGTH:
        return _varint(message, at)
    if kind in (_FIXED64, _FIXED32):
        return 8 if kind == _FIXED64 else 4, at
    raise BadMessage(f"wire type {kind} at byte {at}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BadMessage(f"no number ends before byte {at}")
