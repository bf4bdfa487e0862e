"""Workers that vanish when some chunks are there: the rest comes from storage, and only that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxbench.demo import models
from mxcore.settings import load_settings
from mxcore.transfer.layout import Layout, Placement, all_chunks
from mxcore.transfer.member import Membership
from mxcore.transfer.move import SourceClient
from mxcore.transfer.serve import Holder
from mxserver.wire.calls import ServerClient
from tests.vllm.conftest import LLAMA, References
from tests.vllm.engines import EngineHost

LARGE = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}  # some chunks of 16 MiB
IMPATIENT = {"stall_timeout_seconds": 2, "server_timeout_seconds": 10}


class PartialSource:
    """A worker of this process that took everything from a source, and gives away only some of it."""

    def __init__(self, server: str, source_id: str, worker_id: str) -> None:
        with ServerClient(server, timeout_seconds=30) as client:
            record = client.get_metadata(source_id, worker_id)
        assert record is not None
        settings = load_settings({"MX_SERVER_ADDRESS": server, "MX_WORKER_GRPC_PORT": 0}, {})
        self.membership = Membership(settings, record.identity, record.worker.worker_rank, record.worker.accelerator)
        [source] = [found for found in self.membership.find_sources() if found.worker_id == worker_id]
        with SourceClient(source, timeout_seconds=30) as client_of_source:
            answer = client_of_source.get_layout("")
        self.layout = Layout.from_proto(answer.layout)
        self.memory = [np.zeros(count, np.uint8) for count in self.layout.extent_bytes]
        addresses = tuple(int(extent.ctypes.data) for extent in self.memory)
        self.placement = Placement(addresses, (0,) * len(addresses), "cpu")
        scalars = {scalar.name: 0.0 for scalar in answer.scalars}
        self.report = self.membership.receive(self.layout, self.placement, scalars, [source])

    def serve(self, digests: bytes | None) -> Holder:
        self.membership.serve(self.layout, self.placement, self.report.scalars, digests, keep_alive=self.memory)
        holder = self.membership.holder
        assert holder is not None
        return holder


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return models.generate(folder / "models" / "large", "llama", LARGE)


@pytest.fixture
def partial(source: EngineHost, server: str, model: Path) -> Iterator[PartialSource]:
    """It stays when the source that had everything has left."""
    report = source.load(model).report
    made = PartialSource(server, report["source_id"], report["worker_id"])
    source.ask("leave")
    yield made
    made.membership.close()


def test_only_what_is_missing_comes_from_storage(
    partial: PartialSource, target: EngineHost, references: References, model: Path
) -> None:
    holder = partial.serve(partial.report.digests)
    count = len(holder.chunks)
    assert count > 4
    given = all_chunks(count * 6 // 10)
    holder.update(given)
    missing_bytes = sum(holder.chunks.bytes_of(chunk) for chunk in range(count) if not given >> chunk & 1)
    loaded = target.load(model, extra=IMPATIENT)

    assert loaded.answers == references.of(model)
    assert loaded.report["path"] == "p2p"
    assert loaded.report["serving"]
    assert "MX_CHUNKS_MISSING" in loaded.report["fallbacks"][0]
    assert loaded.report["chunks_verified"] == count
    read = loaded.report["bytes_from_storage"]
    assert missing_bytes <= read < missing_bytes + 0.05 * loaded.report["bytes"]


def test_files_with_other_bytes_are_found_out(
    partial: PartialSource, target: EngineHost, references: References, model: Path
) -> None:
    """The workers promise something else than the files have: nothing of the mixture stays."""
    partial.memory[-1][:] ^= 1
    holder = partial.serve(None)
    last = len(holder.chunks) - 1  # it ends with the tensor that differs
    holder.update(all_chunks(len(holder.chunks)) & ~(1 << last))
    loaded = target.load(model, extra=IMPATIENT)

    assert loaded.answers == references.of(model)
    assert loaded.report["path"] == "storage"
    assert loaded.report["bytes_from_storage"] == 0
    assert any("MX_DIGEST_MISMATCH" in line for line in loaded.report["fallbacks"])
