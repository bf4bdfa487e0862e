"""The range reader on real files: bytes, bounds, errors, signals, cuts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxcore.errors import StorageError, TruncatedRead
from mxcore.memory.host_buffer import HostBuffer
from mxcore.reading.range_reader import RangeReader, ReadRange, live_file_descriptors

MIB = 1 << 20
SIZE = 20 * MIB + 12345  # more than two pieces, and a rest


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    path.write_bytes(content.tobytes())
    return path


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_a_large_range_is_shared_by_threads(path: Path, content: np.ndarray, threads: int) -> None:
    with HostBuffer(SIZE) as buffer:
        assert RangeReader(threads).read([ReadRange(path, 0, SIZE, buffer)]) == SIZE
        assert np.array_equal(np.frombuffer(buffer, np.uint8), content)


spans = st.lists(
    st.tuples(st.integers(0, SIZE), st.one_of(st.integers(0, 5000), st.integers(0, SIZE))), min_size=0, max_size=30
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans, st.integers(1, 4))
def test_any_ranges(path: Path, content: np.ndarray, spans: list[tuple[int, int]], threads: int) -> None:
    ranges = [(offset, min(length, SIZE - offset)) for offset, length in spans]
    total = sum(length for _, length in ranges)
    destination = np.zeros(total + 2, np.uint8)
    reads, at = [], 1
    for offset, length in ranges:
        reads.append(ReadRange(str(path), offset, length, destination.ctypes.data + at))
        at += length
    assert RangeReader(threads).read(reads) == total
    expected = np.concatenate([content[offset : offset + length] for offset, length in ranges] or [content[:0]])
    assert np.array_equal(destination[1:-1], expected)
    assert destination[0] == destination[-1] == 0


def test_neighbours_in_the_file_scattered_in_memory(path: Path, content: np.ndarray) -> None:
    """More of them than one preadv takes, with empty ones between."""
    pieces = [np.zeros(length, np.uint8) for length in [1, 0, 7, 4096, 0, 33] * 100]
    reads, at = [], 5
    for piece in pieces:
        reads.append(ReadRange(path, at, len(piece), piece))
        at += len(piece)
    assert RangeReader(3).read(iter(reads)) == at - 5
    assert np.array_equal(np.concatenate(pieces), content[5:at])


def test_kinds_of_files_and_destinations(path: Path, content: np.ndarray) -> None:
    reader = RangeReader()
    expected = content[100:200].tobytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for file in (path, str(path), os.fsencode(path), descriptor):
            for destination in (bytearray(100), memoryview(bytearray(100)), np.zeros((10, 10), np.uint8)):
                assert reader.read([ReadRange(file, 100, 100, destination)]) == 100
                assert bytes(destination) == expected
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0  # neither moved nor closed
    finally:
        os.close(descriptor)
    with HostBuffer(100) as buffer:
        reader.read([ReadRange(path, 100, 100, buffer.address)])
        assert bytes(buffer) == expected
        larger = bytearray(b"x" * 102)
        reader.read([ReadRange(path, 100, 100, larger)])
        assert bytes(larger) == expected + b"xx"
    assert reader.read([]) == 0
    assert repr(reader) == "RangeReader(threads=4)"


def test_each_path_is_opened_once_and_closed(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    reads = [ReadRange(path, index, 1, bytearray(1)) for index in range(2000)]
    assert RangeReader(4).read(reads) == 2000
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert live_file_descriptors() == 0


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    offset = (5 << 30) + 3
    with path.open("wb") as file:
        file.seek(offset)
        file.write(b"the end")
    destination = bytearray(b"x" * 20)
    assert RangeReader(2).read([ReadRange(path, offset - 13, 20, destination)]) == 20
    assert bytes(destination) == bytes(13) + b"the end"


@pytest.mark.parametrize(
    ("offset", "length", "got"),
    [(SIZE, 1, 0), (SIZE - 1, 2, 1), (0, SIZE + 1, SIZE), (2**62, 5, 0), (3, 2**62, SIZE - 3)],
)
def test_a_range_beyond_the_end_is_found_before_anything_is_read(
    path: Path, offset: int, length: int, got: int
) -> None:
    first = bytearray(10)
    with pytest.raises(TruncatedRead) as caught:
        RangeReader(2).read([ReadRange(path, 0, 10, first), ReadRange(path, offset, length, 4096)])
    error = caught.value
    assert (error.file, error.offset, error.wanted, error.got) == (str(path), offset, length, got)
    assert str(path) in str(error)
    assert first == bytes(10)


def test_nothing_at_the_end_is_no_error(path: Path) -> None:
    assert RangeReader(2).read([ReadRange(path, SIZE, 0, 0), ReadRange(path, SIZE + 5, 0, bytearray())]) == 0


def test_a_file_that_is_cut_while_read(tmp_path: Path) -> None:
    """Its size is right when the read begins, and wrong before the bytes are there: an error, never a crash."""
    path = tmp_path / "cut.bin"
    stop = threading.Event()

    def cut_and_grow() -> None:
        while not stop.is_set():
            os.truncate(path, 4 * MIB)
            os.truncate(path, 64 * MIB)

    path.write_bytes(b"")
    os.truncate(path, 64 * MIB)
    cutter = threading.Thread(target=cut_and_grow)
    cutter.start()
    try:
        errors: list[TruncatedRead] = []
        with HostBuffer(64 * MIB) as buffer:
            while not errors:
                try:
                    RangeReader(2).read([ReadRange(path, 0, 64 * MIB, buffer)])
                except TruncatedRead as error:
                    errors.append(error)
        assert 0 <= errors[-1].got <= errors[-1].wanted == 64 * MIB
    finally:
        stop.set()
        cutter.join()


def test_a_file_that_ends_before_its_size_says() -> None:
    """Files of sysfs say 4096 bytes and have a few: the cut is found by the read."""
    path = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    text = path.read_bytes()
    assert len(text) < 10 < path.stat().st_size
    destination = bytearray(10)
    with pytest.raises(TruncatedRead, match=f"the file ends after {len(text)} of them") as caught:
        RangeReader(1).read([ReadRange(path, 0, 10, destination)])
    assert (caught.value.offset, caught.value.wanted, caught.value.got) == (0, 10, len(text))
    assert destination.startswith(text)


def test_files_of_no_size() -> None:
    """Files of procfs say 0 bytes and have some; /dev/zero has no end; an empty file has none."""
    for file in ("/proc/self/status", "/dev/zero"):
        assert RangeReader(1).read([ReadRange(file, 0, 10, bytearray(10))]) == 10
    with pytest.raises(TruncatedRead) as caught:
        RangeReader(1).read([ReadRange("/dev/null", 3, 10, bytearray(10))])
    assert caught.value.got == 0


def test_an_input_output_error() -> None:
    """/proc/self/mem says EIO where no memory is mapped."""
    with pytest.raises(StorageError, match="reading 10 bytes at 4096 failed after 0: Input/output error") as caught:
        RangeReader(1).read([ReadRange("/proc/self/mem", 4096, 10, bytearray(10))])
    error = caught.value
    assert type(error) is StorageError
    assert (error.file, error.offset, error.wanted, error.got) == ("/proc/self/mem", 4096, 10, 0)


def test_errors_of_files(tmp_path: Path, path: Path) -> None:
    reader = RangeReader(2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for file, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (fifo, "Illegal seek"),
        (12345, "descriptor 12345: .*Bad file descriptor"),
        (-1, "Bad file descriptor"),
        ("a\0b", "no NUL"),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            reader.read([ReadRange(path, 0, 10, bytearray(10)), ReadRange(file, 5, 10, bytearray(10))])
        assert not isinstance(caught.value, TruncatedRead)
        assert live_file_descriptors() == 0
    with pytest.raises(TypeError):
        reader.read([ReadRange(1.5, 0, 1, bytearray(1))])  # type: ignore[arg-type]


def test_an_address_that_is_no_memory_is_an_error(path: Path) -> None:
    """The kernel finds it: EFAULT, no crash. Page 1 is never mapped."""
    with pytest.raises(StorageError, match="Bad address") as caught:
        RangeReader(2).read([ReadRange(path, 7, 1000, 4096)])
    assert (caught.value.offset, caught.value.wanted, caught.value.got) == (7, 1000, 0)


def test_the_first_error_stops_the_others(path: Path) -> None:
    with HostBuffer(SIZE) as buffer:
        reads = [ReadRange(path, 0, 10, 4096)] * 50 + [ReadRange(path, 0, SIZE, buffer)]
        with pytest.raises(StorageError, match="Bad address"):
            RangeReader(4).read(reads)
        assert buffer.exports == 0


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (2**63, 0), (0, 2**63), (2**62, 2**62), (2**63 - 1, 1), (2**70, 1)]
)
def test_refused_ranges(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="no range of a file"):
        ReadRange("file", offset, length, 4096)


def test_refused_destinations(path: Path) -> None:
    reader = RangeReader(1)
    for destination, error, message in (
        (bytearray(9), ValueError, "the destination has 9 bytes"),
        (0, ValueError, "are no memory"),
        (2**64 - 5, ValueError, "are no memory"),
        (-1, OverflowError, None),
        (2**64, OverflowError, None),
        (b"0123456789", BufferError, None),
        (np.zeros(20, np.uint8)[::2], (BufferError, ValueError), None),
        ("0123456789", TypeError, None),
    ):
        with pytest.raises(error, match=message):
            reader.read([ReadRange(path, 0, 10, destination)])  # type: ignore[arg-type]
        assert live_file_descriptors() == 0
    with pytest.raises(TypeError):
        reader.read([("file", 0, 1, 4096)])  # type: ignore[list-item]


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_refused_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        RangeReader(threads)


def test_destinations_are_held_while_read(path: Path) -> None:
    """A bytearray cannot be resized under the threads; afterwards it can."""
    destination = bytearray(SIZE)
    refused = threading.Event()
    done = threading.Event()

    def resize() -> None:
        while not done.is_set():
            try:
                destination.append(0)
                destination.pop()
            except BufferError:
                refused.set()

    resizer = threading.Thread(target=resize)
    resizer.start()
    try:
        while not refused.is_set():
            RangeReader(2).read([ReadRange(path, 0, SIZE, destination)])
    finally:
        done.set()
        resizer.join()
    destination.append(0)


def test_one_reader_in_many_threads(path: Path, content: np.ndarray) -> None:
    reader = RangeReader(2)
    failed: list[int] = []

    def read(index: int) -> None:
        destination = np.zeros(MIB, np.uint8)
        for _ in range(5):
            reader.read([ReadRange(path, index, MIB, destination)])
            if not np.array_equal(destination, content[index : index + MIB]):
                failed.append(index)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.fixture
def signal_storm() -> Iterator[list[int]]:
    """SIGALRM every half millisecond, with a handler that does not restart system calls."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 3])
def test_signals_do_not_disturb(path: Path, content: np.ndarray, signal_storm: list[int], threads: int) -> None:
    reads = 0
    with HostBuffer(SIZE) as buffer:
        while len(signal_storm) < 50 or reads < 5:
            assert RangeReader(threads).read([ReadRange(path, 0, SIZE, buffer)]) == SIZE
            reads += 1
        assert np.array_equal(np.frombuffer(buffer, np.uint8), content)


def test_ctrl_c_ends_a_long_read(tmp_path: Path) -> None:
    """SIGINT in the main thread: KeyboardInterrupt, with all threads ended and nothing left open."""
    path = tmp_path / "sparse.bin"
    path.write_bytes(b"")
    os.truncate(path, 1 << 42)  # 4 TiB of holes: minutes of reading
    script = (
        "import signal, sys, threading\n"
        "from mxcore.memory.host_buffer import HostBuffer\n"
        "from mxcore.reading.range_reader import RangeReader, ReadRange, live_file_descriptors\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "buffer = HostBuffer(8 << 20)\n"
        "reads = [ReadRange(sys.argv[1], at, 8 << 20, buffer.address) for at in range(0, 1 << 42, 8 << 20)]\n"
        "def tell():\n"
        "    while not live_file_descriptors():\n        pass\n"
        "    print('reading', flush=True)\n"
        "try:\n"
        "    threading.Thread(target=tell).start()\n"
        "    RangeReader(2).read(reads)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', live_file_descriptors())\n"
        "buffer.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output == "interrupted 0\n"
    assert process.returncode == 0
