"""FileChunk messages taken off the wire without a copy of their data."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from mxserver.wire.errors import FileRefused
from mxserver.wire.files.stream_call import StreamConnection
from mxserver.wire.proto import model_pb2

_DATA_FIELD = 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

_HEAD_BYTES = 2048  # more than all fields but the data take: a path is 1 KiB at most


class BadMessage(ValueError):
    """Bytes that are not a protobuf message."""


class ChunkReader:
    """The chunks of a running call of StreamModelFiles, one after the other. Not thread-safe.

    Servers of this project send the data last, so that it can be received in its final place. If it comes earlier,
    the whole message is received and copied.
    """

    def __init__(self, call: StreamConnection) -> None:
        self._call = call
        self._head = bytearray(_HEAD_BYTES)
        self._come = memoryview(b"")  # data that has been received
        self.data_bytes = 0  # of the chunk that `next_fields` returned

    def next_fields(self) -> model_pb2.FileChunk | None:
        """A chunk without its data, which must be taken by `read_into`; None after the last one.

        Raises:
            FileRefused: bytes that are no chunk.
            CallFailed: as the call.
        """
        length = self._call.next_message()
        if length is None:
            return None
        head = memoryview(self._head)[: min(length, _HEAD_BYTES)]
        self._call.read_into(head)
        try:
            return self._fields(head, length)
        except (BadMessage, DecodeError) as error:
            raise FileRefused(f"a chunk of a file cannot be read: {error}") from error

    def _fields(self, head: memoryview, length: int) -> model_pb2.FileChunk:
        try:
            end, at, self.data_bytes = _fields_before_data(head)
        except BadMessage:
            if len(head) == length:
                raise
            end, at, self.data_bytes = 0, 0, 0  # it is only cut
        if at + self.data_bytes == length:
            self._come = head[at:]
            return model_pb2.FileChunk.FromString(bytes(head[:end]))
        whole = bytearray(length)
        whole[: len(head)] = head
        self._call.read_into(memoryview(whole)[len(head) :])
        fields, self._come = split_chunk(whole)
        self.data_bytes = len(self._come)
        return fields

    def read_into(self, view: memoryview) -> None:
        """The chunk's data, `data_bytes` of it, which must be the length of `view`. Raises CallFailed."""
        come = len(self._come)
        view[:come] = self._come
        self._call.read_into(view[come:])
        self._come = memoryview(b"")


def _fields_before_data(head: memoryview) -> tuple[int, int, int]:
    """Returns where the fields before the data end, where the data begins, and its length. If no data is visible yet:
    the end of the visible fields, twice, and 0. Raises BadMessage.
    """
    at = 0
    while at < len(head):
        begin = at
        tag, at = _varint(head, at)
        length, at = _field_length(head, tag & 7, at)
        if tag == _DATA_FIELD << 3 | _LENGTH:
            return begin, at, length
        if at + length > len(head):
            break
        at += length
    return at, at, 0


def split_chunk(message: bytes | bytearray) -> tuple[model_pb2.FileChunk, memoryview]:
    """The fields of a whole message without its data, and the data as a view of `message`. Raises BadMessage.

    The encoding is https://protobuf.dev/programming-guides/encoding/; the last of several values of a field counts.
    """
    view = memoryview(message)
    fields = bytearray()
    data = view[:0]
    at = 0
    while at < len(message):
        begin = at
        tag, at = _varint(view, at)
        length, at = _field_length(view, tag & 7, at)
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


def _field_length(message: memoryview, kind: int, at: int) -> tuple[int, int]:
    """The bytes of a field's value, and where it begins."""
    if kind == _VARINT:
        return _varint(message, at)[1] - at, at
    if kind == _LENGTH:
        return _varint(message, at)
    if kind in (_FIXED64, _FIXED32):
        return 8 if kind == _FIXED64 else 4, at
    raise BadMessage(f"wire type {kind} at byte {at}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
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
