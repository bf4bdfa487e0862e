"""A receive that ended early: what is missing, filled otherwise, is right as a whole or refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mxcore.errors import ChunksMissing, DigestMismatch, ReceivedInPart
from mxcore.settings import load_settings
from mxcore.transfer.layout import SwarmPlan, all_chunks, build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxcore.transfer.receive import Receiver
from mxserver.wire.proto import load_pb2
from tests.transfer.memory import HostTensors, identity, model_specs

SEED = 7
CHUNK_BYTES = 65536
SETTINGS = {"MX_TRANSPORT": "tcp", "MX_STALL_TIMEOUT_SECS": 2, "MX_WORKER_GRPC_PORT": 0, "MX_DRAIN_TIMEOUT_SECS": 1}


class Half:
    """A receiver whose only holder has every other chunk and does not lie."""

    def __init__(self) -> None:
        settings = load_settings(SETTINGS, {})
        self.source = Membership(settings, identity(), 0, "cpu", chunk_bytes=CHUNK_BYTES)
        self.there = HostTensors(model_specs(1), SEED)
        layout, placement = build_layout("raw", self.there.local_tensors())
        self.source.serve(layout, placement, {"scale": 0.5}, keep_alive=self.there)
        holder = self.source.holder
        assert holder is not None
        self.count = len(holder.chunks)
        self.given = all_chunks(self.count) // 3  # 0b...010101
        holder.update(self.given)
        self.chunks = holder.chunks
        self.here = HostTensors(model_specs(1), None)
        layout, self.placement = build_layout("raw", self.here.local_tensors())
        self.receiver = Receiver(
            layout,
            self.placement,
            settings=settings,
            worker_id="target",
            scalar_names=["scale"],
            chunk_bytes=CHUNK_BYTES,
        )

    def receive(self) -> ReceivedInPart:
        source = Source(self.source.source_id, self.source.worker_id, 0, self.source.endpoint or "")
        with pytest.raises(ChunksMissing) as raised:
            self.receiver.receive([source])
        assert raised.value.missing == tuple(i for i in range(self.count) if not self.given >> i & 1)
        assert raised.value.partial is not None
        return raised.value.partial

    def fill(self, partial: ReceivedInPart) -> int:
        """Copies what is missing from the holder's memory; returns how many bytes that were."""
        return self.here.copy_from(self.there, partial.missing_stretches())


@pytest.fixture
def half() -> Iterator[Half]:
    value = Half()
    yield value
    value.source.close()


def test_the_rest_is_taken_from_elsewhere(half: Half) -> None:
    partial = half.receive()
    missing = partial.missing_bytes
    assert 0 < missing < partial.total_bytes
    assert half.fill(partial) == missing
    report = partial.complete()
    assert half.here.equal_bytes(half.there)
    assert (report.bytes, report.bytes_otherwise) == (partial.total_bytes, missing)
    assert report.bytes_from == {half.source.worker_id: partial.total_bytes - missing}
    assert report.scalars == {"scale": 0.5}
    assert report.chunks_verified == half.count
    holder = half.source.holder
    assert holder is not None
    assert report.digests == holder.digests
    assert partial.missing_stretches() == []


def test_what_was_not_filled_is_refused(half: Half) -> None:
    partial = half.receive()
    with pytest.raises(DigestMismatch, match="of them among the"):
        partial.complete()


def test_a_verified_chunk_that_was_written_over_is_refused(half: Half) -> None:
    partial = half.receive()
    half.fill(partial)
    chunk = (half.given & -half.given).bit_length() - 1
    address = half.chunks.slice_of(half.chunks.local_addresses(half.placement), chunk)[0]
    for name, storage in half.here.storages.items():
        if half.here.address(name) <= address < half.here.address(name) + storage.nbytes:
            storage[address - half.here.address(name)] ^= 1
    with pytest.raises(DigestMismatch, match=rf"chunks \[{chunk}\] .* 0 of them among"):
        partial.complete()


def test_what_landed_late_counts_as_missing(half: Half) -> None:
    partial = half.receive()
    for storage in half.here.storages.values():
        np.bitwise_not(storage, out=storage)
    assert partial.missing_bytes == partial.total_bytes


def test_chunks_that_came_by_another_way() -> None:
    plan = SwarmPlan(4, 100)
    plan.add_holder("a", all_chunks(4))
    plan.claim("a", [0], 0.0)
    with pytest.raises(ValueError, match="are not missing"):
        plan.adopt(0b11)
    plan.adopt(0b1110)
    assert plan.completed == 0b1110
    plan.done("a", 0, 1.0)
    assert plan.finished


def test_the_server_hears_of_it_as_of_one_load(half: Half) -> None:
    partial = half.receive()
    missing = half.fill(partial)
    with half.source.loads.loading(load_pb2.LOAD_PATH_UNSPECIFIED) as step:
        partial.complete().tell(step)
    told = half.source.loads.report()
    assert told is not None
    assert (told.bytes, told.bytes_from_workers) == (partial.total_bytes, partial.total_bytes - missing)
    assert [given.worker_id for given in told.given] == [half.source.worker_id]
