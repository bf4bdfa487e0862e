"""The worker of `mx bench peer` and `cluster`: its memory, its content, and what it says of a receive."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxbench.fleet import scaled, total_bytes
from mxbench.fleet.model_memory import CONTENT_BYTES, HostMemory, content_pieces, tensors_of, written_file
from mxbench.fleet.shapes import ALIGNED_BYTES, stretches


def test_content_is_the_same_everywhere_and_differs_by_version(tmp_path: Path) -> None:
    size_bytes = 2 * CONTENT_BYTES + 1000
    pieces = dict(content_pieces(5, size_bytes))
    assert list(pieces) == [0, CONTENT_BYTES, 2 * CONTENT_BYTES]
    assert sum(map(len, pieces.values())) == size_bytes
    assert pieces == dict(content_pieces(5, size_bytes))
    assert pieces[0] != dict(content_pieces(6, size_bytes))[0]
    assert written_file(tmp_path, 5, size_bytes).read_bytes() == b"".join(pieces.values())


@pytest.mark.parametrize(("kind", "tensors"), [("few", 8), ("many", 20)])
def test_tensors_lie_side_by_side(kind: str, tensors: int) -> None:
    shape = scaled(kind, 20 * (50 << 10))
    places = stretches(shape)
    assert len(places) == tensors
    assert total_bytes(shape) == 20 * (50 << 10)
    assert all(begin % ALIGNED_BYTES == 0 for begin, _ in places)
    memory = HostMemory(places[-1][1])
    assert [tensor.address - memory.address for tensor in tensors_of(memory, places)] == [begin for begin, _ in places]
    memory.write(3, b"abc")
    assert memory.read(2, 5) == b"\0abc\0"
    memory.close()
