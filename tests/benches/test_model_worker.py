"""The worker of the benches: its memory, its content, and what it says of a receive."""

from __future__ import annotations

import itertools
from pathlib import Path

import click
import pytest

from mxbench.fleet import scaled, total_bytes
from mxbench.fleet.fleet import Fleet
from mxbench.fleet.model_memory import CONTENT_BYTES, HostMemory, content_pieces, tensors_of, written_file
from mxbench.fleet.shapes import ALIGNED_BYTES, places_of, stretches
from mxbench.transfer.command import Pair


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


def test_a_task_says_where_tensors_lie() -> None:
    assert places_of({"shape": [[2, 100]], "gap_bytes": 64}) == [(512, 612), (1024, 1124)]
    cut = places_of({"model_bytes": 1000})
    assert len(cut) == 64
    assert cut[0][0] == 0
    assert cut[-1][1] == 1000
    assert all(one[1] == other[0] for one, other in itertools.pairwise(cut))


def test_a_bit_that_flips_at_the_seed_costs_it_its_receiver() -> None:
    task = {"model": "bench/test", "content": 5, "model_bytes": 1 << 20, "chunk_bytes": 64 << 10, "strategy": "star"}
    with Fleet() as fleet:
        seed = fleet.add({**task, "role": "seed"})
        worker = seed.expect("serving")["worker"]
        receiver = fleet.add({**task, "role": "receiver"})
        receiver.expect("ready")
        receiver.send("start")
        done = receiver.expect("done")
        assert (done["right"], done["path"], done["bytes_from"]) == (True, "p2p", {worker: 1 << 20})
        seed.send(f"flip {1 << 40}")
        seed.expect("flipped")
        receiver.send("again")
        receiver.expect("ready")
        receiver.send("start")
        done = receiver.expect("done")
    assert (done["right"], done["path"]) == (True, "storage")
    assert {lost["worker"] for lost in receiver.lost} <= {worker}  # the seed may have found out by itself before


def test_a_receiver_looks_at_digests_or_not() -> None:
    with Fleet() as fleet:
        pair = Pair(fleet, "same-host", [(4, 1 << 20)], 0)
        for verified in (True, False, True):
            moving, whole = pair.receive(verified=verified)
            assert moving >= whole > 0
        pair.source.send("flip 77777")
        pair.source.expect("flipped")
        with pytest.raises(click.ClickException, match="the transfer failed"):
            pair.receive(verified=False)  # wrong bytes are seen by the bench itself
