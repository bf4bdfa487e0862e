"""The compiled parts check what they are given, and AUTO chooses by what the page cache has."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.errors import TruncatedRead
from mxcore.memory import HostBuffer
from mxcore.reading import BUFFERED, DIRECT, MAPPED, URING, FileSet, JobList, checkpoint_reader
from mxcore.reading.file_set import live_file_descriptors
from mxcore.reading.read_jobs import PART_COLUMNS
from mxcore.storage.plan import steps

SIZE = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileSet]:
    (tmp_path / "a").write_bytes(bytes(range(256)) * (SIZE // 256))
    with FileSet([tmp_path / "a"]) as opened:
        yield opened


@pytest.fixture
def memory() -> Iterator[HostBuffer]:
    with HostBuffer(SIZE) as buffer:
        yield buffer


BIG = 1 << 62


@pytest.mark.parametrize(
    "part",
    [
        (1, 0, 1, 0, 1, 1, 0),
        (-1, 0, 1, 0, 1, 1, 0),
        (0, -1, 1, 0, 1, 1, 0),
        (0, 0, 0, 0, 1, 1, 0),
        (0, 0, 1, 0, 0, 1, 0),
        (0, 0, 1, 0, 1, 0, 0),
        (0, 0, 8, 4, 2, 1, 8),
        (0, 0, 8, 8, 2, 1, 4),
        (0, 0, 8, BIG, 4, 1, 8),
        (0, 0, 8, 8, BIG, 1, 8),
        (0, 0, 8, 8, 2, 1, -8),
        (0, 0, 8, 0, 1, (1 << 63) - 4, 0),
    ],
)
def test_parts_that_are_none(files: FileSet, part: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"part|file"):
        JobList(files, array("q", part))


def test_parts_beyond_the_file(files: FileSet, memory: HostBuffer) -> None:
    for part in ((0, SIZE, 1, 0, 1), (0, SIZE - 1, 2, 0, 1), (0, 0, 8, SIZE, 2), (0, (1 << 63) - 1, 1, 0, 1)):
        with pytest.raises(TruncatedRead, match="the file has"):
            JobList(files, array("q", (*part, memory.address, SIZE)))


def test_other_arguments_that_are_none(files: FileSet, memory: HostBuffer) -> None:
    good = array("q", (0, 0, SIZE, 0, 1, memory.address, 0))
    with pytest.raises(ValueError, match="rows of 7"):
        JobList(files, array("q", range(PART_COLUMNS - 1)))
    with pytest.raises(TypeError, match="int64"):
        JobList(files, array("i", range(PART_COLUMNS)))
    for piece_bytes in (0, 4095, 5000, 1 << 31):
        with pytest.raises(ValueError, match="power of two"):
            JobList(files, good, piece_bytes=piece_bytes)
    for groups in ([], [0], [1, 1], [0, 0, 1], [0, 2]):
        with pytest.raises(ValueError, match="group"):
            JobList(files, good, groups=array("q", groups))
    jobs = JobList(files, good)
    order = array("q", [0])
    for wrong in (
        {"way": 9},
        {"way": -1},
        {"way": URING, "other_way": BUFFERED},
        {"way": BUFFERED, "other_way": URING},
        {"way": BUFFERED, "threads": 0},
        {"way": BUFFERED, "threads": 2, "lanes": 1},
        {"way": BUFFERED, "threads": 99, "lanes": 99},
        {"way": MAPPED},
        {"way": DIRECT},
    ):
        with pytest.raises(ValueError, match=r"way|thread|mapped|slots"):
            checkpoint_reader.read_jobs(jobs, order, **wrong)
    with pytest.raises(ValueError, match="no job 1"):
        checkpoint_reader.read_jobs(jobs, array("q", [1]), way=BUFFERED)
    grouped = JobList(files, good, groups=array("q", [0, 1]))
    with pytest.raises(ValueError, match="room for 0"):
        checkpoint_reader.read_jobs(grouped, order, way=BUFFERED, digests=array("q"))


def test_jobs_are_cut_at_multiples(files: FileSet, memory: HostBuffer) -> None:
    jobs = JobList(files, array("q", (0, 100, 10_000, 0, 1, memory.address, 0)), piece_bytes=4096)
    assert len(jobs) == 3  # 100..4096..8192..10100
    assert jobs.total_bytes == 10_000
    assert jobs.files is files


def test_a_gap_is_read_over_or_not(files: FileSet, memory: HostBuffer) -> None:
    """Runs of 16 bytes 1024 apart: past the cache few reads, from the cache the bytes alone."""
    parts = array("q", (0, 64, 16, 1024, 1000, memory.address, 16))
    files.open_direct(0)
    files.map(0)
    with HostBuffer(2 << 20) as slots:
        for way, most in ((BUFFERED, 16_000), (MAPPED, 16_000), (DIRECT, SIZE), (URING, SIZE)):
            jobs = JobList(files, parts, piece_bytes=SIZE)
            memoryview(memory)[:16000] = bytes(16000)
            outcome = checkpoint_reader.read_jobs(jobs, array("q", range(len(jobs))), way=way, slots=slots)
            assert 16_000 <= outcome["read_bytes"] <= most + 4 * 4096
            assert outcome["done_bytes"] == 16_000
            assert bytes(memoryview(memory)[:16000]) == bytes(range(64, 80)) * 1000


def test_what_the_page_cache_has_is_known_in_both_ways(files: FileSet, memory: HostBuffer) -> None:
    jobs = JobList(files, array("q", (0, 0, SIZE, 0, 1, memory.address, 0)))
    assert jobs.resident() == b"\0"  # not mapped: unknown
    files.map(0)
    assert jobs.resident() == b"\xff"
    assert jobs.resident(by_reading=True) == b"\xff"


def test_auto_maps_what_is_cached_and_tries_two_ways_when_it_is_much(files: FileSet, memory: HostBuffer) -> None:
    parts = array("q", (0, 0, SIZE, 0, 1, memory.address, 0))
    few, many = JobList(files, parts), JobList(files, parts, piece_bytes=4096)
    assert [(step.way, step.other_way) for step in steps(files, few, "auto")] == [(MAPPED, -1)]
    assert [(step.way, step.other_way) for step in steps(files, many, "auto")] == [(MAPPED, BUFFERED)]
    step = steps(files, many, "auto")[0]
    outcome = checkpoint_reader.read_jobs(
        many, step.order, way=step.way, other_way=step.other_way, threads=step.threads, lanes=step.lanes
    )
    assert all(count >= 4 * 4096 for count in outcome["bytes"])
    assert bytes(memory) == bytes(range(256)) * (SIZE // 256)


class Enough(Exception):
    pass


@pytest.mark.parametrize("way", [BUFFERED, MAPPED])
def test_files_that_are_closed_in_the_middle_of_a_read_stay_open_until_its_end(
    files: FileSet, memory: HostBuffer, tmp_path: Path, way: int
) -> None:
    """Else the descriptor's number is another file's, whose bytes are read."""
    other = tmp_path / "other"
    other.write_bytes(b"x" * SIZE)
    before, number = live_file_descriptors(), files.descriptor(0)
    rows = array("q", (0, 0, SIZE, 0, 1, memory.address, 0)) * 65_536  # more than anybody waits for
    jobs = JobList(files, rows)
    files.map(0)
    looks = 0

    def look(done_bytes: int) -> None:
        nonlocal looks
        looks += 1
        files.close()
        with other.open("rb") as opened:
            assert opened.fileno() != number
        assert live_file_descriptors() == before
        if looks == 2:
            raise Enough

    with pytest.raises(Enough):
        checkpoint_reader.read_jobs(jobs, array("q", range(len(jobs))), way=way, progress=look)
    assert live_file_descriptors() == before - 1
    with memoryview(memory) as view:
        assert bytes(view[:256]) == bytes(range(256))
    with pytest.raises(ValueError, match="not open"):
        files.descriptor(0)
    with pytest.raises(ValueError, match="not open"):
        checkpoint_reader.read_jobs(jobs, array("q", range(len(jobs))), way=way)
