"""Items that are made ahead: in order, few at a time, errors in their turn, nothing left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.models import file_stream
from mxserver.models.file_stream import CHUNKS_IN_MEMORY, FileDamaged, Span, messages
from mxserver.models.names import ModelKey, model_name
from mxserver.models.record import FileRecord, ModelRecord
from mxserver.wire import model_pb2
from mxserver.wire.ahead import made_ahead
from mxserver.wire.file_chunk import split_chunk
from tests.models.conftest import digest_of, pattern

CHUNK = 65536


class Counted:
    """Counts what was made; `made` is notified with every item."""

    def __init__(self, count: int, *, fails_at: int = -1) -> None:
        self.made = 0
        self.changed = threading.Condition()
        self.ended = threading.Event()
        self._count = count
        self._fails_at = fails_at

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self._count):
                if number == self._fails_at:
                    raise FileDamaged(f"item {number}")
                with self.changed:
                    self.made += 1
                    self.changed.notify_all()
                yield number
        finally:
            self.ended.set()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.made >= count, 30)


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "under-test"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_items_come_in_order(count: int) -> None:
    assert list(made_ahead(iter(Counted(100)), count, "under-test")) == list(range(100))
    assert list(made_ahead(iter(()), count, "under-test")) == []


@pytest.mark.parametrize("count", [2, 4])
def test_no_more_exist_than_allowed(count: int) -> None:
    counted = Counted(50)
    items = made_ahead(iter(counted), count, "under-test")
    for number, item in enumerate(items):
        counted.wait_for(min(number + count, 50))  # the next ones are made while this one is held
        assert counted.made <= item + count
    assert counted.made == 50


def test_error_comes_after_the_items_before_it() -> None:
    items = made_ahead(iter(Counted(5, fails_at=3)), 2, "under-test")
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FileDamaged, match="item 3"):
        next(items)


def test_nothing_is_made_before_it_is_asked_for() -> None:
    counted = Counted(5)
    made_ahead(iter(counted), 2, "under-test")
    assert counted.made == 0
    assert not workers()


def test_caller_that_leaves_ends_the_thread() -> None:
    counted = Counted(1000)
    items = made_ahead(iter(counted), 2, "under-test")
    next(items)
    items.close()  # type: ignore[attr-defined] # it is a generator
    assert counted.ended.wait(30)
    assert counted.made <= 4


def test_caller_that_leaves_does_not_wait_for_a_source_that_hangs() -> None:
    hangs, reached = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        reached.set()
        hangs.wait(60)
        yield 1

    items = made_ahead(source(), 2, "under-test")
    next(items)
    assert reached.wait(30)
    items.close()  # type: ignore[attr-defined] # it is a generator
    assert workers()  # it returned though the source still hangs
    hangs.set()


@pytest.fixture
def record(tmp_path: Path) -> ModelRecord:
    files = {"a.safetensors": pattern(10 * CHUNK + 1, 5), "empty": b"", "sub/b": pattern(100, 6)}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    key = ModelKey(model_name(model_pb2.HUGGING_FACE, "org/x"), "a" * 40)
    return ModelRecord(key, tuple(FileRecord(path, len(data), "", path) for path, data in files.items()), True, 1)


def spans(record: ModelRecord) -> list[Span]:
    return [Span(file, 0, file.size) for file in record.files]


def test_messages_are_the_files(tmp_path: Path, record: ModelRecord) -> None:
    got: dict[str, bytes] = {}
    for message in messages(tmp_path, record, spans(record), CHUNK):
        fields, data = split_chunk(message)
        assert fields.offset == len(got.setdefault(fields.relative_path, b""))
        got[fields.relative_path] += data
    for file in record.files:
        assert digest_of(got[file.path]) == digest_of((tmp_path / file.path).read_bytes())


def test_stream_reads_one_chunk_ahead_of_its_client(
    tmp_path: Path, record: ModelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds a stream's memory: a client that takes nothing more makes the server read nothing more."""
    counted = Counted(0)
    real = file_stream.chunk_message

    def noted(fields: bytes, handle: int, offset: int, length: int) -> bytes:
        message = real(fields, handle, offset, length)
        with counted.changed:
            counted.made += 1
            counted.changed.notify_all()
        return message

    monkeypatch.setattr(file_stream, "chunk_message", noted)
    stream = messages(tmp_path, record, spans(record), CHUNK)
    for taken in range(1, 8):
        next(stream)
        counted.wait_for(taken + CHUNKS_IN_MEMORY - 1)
        assert counted.made == taken + CHUNKS_IN_MEMORY - 1


def test_stream_that_is_left_closes_its_file(tmp_path: Path, record: ModelRecord) -> None:
    def is_open() -> bool:
        names = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
        return str(tmp_path / "a.safetensors") in names

    stream = messages(tmp_path, record, spans(record), CHUNK)
    next(stream)
    assert is_open()
    stream.close()  # type: ignore[attr-defined] # it is a generator
    del stream
    for thread in threading.enumerate():
        if thread.name == "read-chunks":
            thread.join(30)
    assert not is_open()


def test_file_that_is_cut_while_it_is_sent(tmp_path: Path, record: ModelRecord) -> None:
    stream = messages(tmp_path, record, spans(record), CHUNK)
    next(stream)
    os.truncate(tmp_path / "a.safetensors", 3 * CHUNK)
    with pytest.raises(FileDamaged, match="was cut"):
        list(stream)
