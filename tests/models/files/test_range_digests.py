"""Digests of parts are made once for each state of a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from mxserver.files_port import range_digests
from mxserver.files_port.range_digests import RangeDigests


def test_a_part_is_hashed_once_while_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    data = bytes(range(256)) * 16
    file.write_bytes(data)
    made: list[tuple[int, int]] = []
    theirs = range_digests.read_blocks

    def counted(handle: int, begin: int, end: int, take: Callable[[memoryview], object]) -> int:
        made.append((begin, end))
        return theirs(handle, begin, end, take)

    monkeypatch.setattr(range_digests, "read_blocks", counted)
    digests = RangeDigests(most=2)
    with file.open("rb") as opened:
        for _ in range(3):
            assert digests.of(opened.fileno(), 5, 1000) == xxhash.xxh3_64(data[5:1000]).hexdigest()
        assert made == [(5, 1000)]
        digests.of(opened.fileno(), 5, 1000, afresh=True)
        digests.of(opened.fileno(), 0, 1)
        digests.of(opened.fileno(), 1, 2)
        digests.of(opened.fileno(), 5, 1000)  # the oldest one was forgotten
        assert made == [(5, 1000), (5, 1000), (0, 1), (1, 2), (5, 1000)]
    file.write_bytes(b"!" + data[1:])
    os.utime(file, ns=(0, 0))
    with file.open("rb") as opened:
        assert digests.of(opened.fileno(), 0, 10) == xxhash.xxh3_64(b"!" + data[1:10]).hexdigest()
