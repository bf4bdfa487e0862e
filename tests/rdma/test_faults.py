"""What goes wrong over real verbs: a cut wire, a holder that RDMA does not reach, memory that may not be pinned."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mxcore.errors import ChunksMissing
from tests.rdma.conftest import Wire, packets_sent
from tests.transfer.conftest import StartWorker
from tests.transfer.memory import model_specs
from tests.transfer.test_exchange import SEED, Target, failing

pytestmark = pytest.mark.rdma
LIMIT_BYTES = 8 << 20
PINS_LITTLE = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", f"--memlock={LIMIT_BYTES}")


def test_a_cut_wire_is_noticed_by_the_port_and_costs_what_was_in_flight(start_worker: StartWorker, wire: Wire) -> None:
    source = start_worker("rdma", seed=SEED, megabytes=20).serve()
    target = Target("rdma", model_specs(20))
    target.at_first_chunk.append(wire.cut)
    with failing(ChunksMissing, source.worker_id, "a read with"):  # UCX said so; a stall takes longer
        target.receive(source)
    wire.mend()
    target.receive(source)
    assert target.is_right()


def test_a_holder_that_rdma_does_not_reach_writes_over_tcp(
    start_worker: StartWorker, wire: Wire, workers_port: str
) -> None:
    source = start_worker("auto", seed=SEED).serve()
    wire.cut()
    target = Target("auto")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("write", "tcp", ())
    wire.mend()
    before = packets_sent(workers_port)
    assert Target("auto").receive(source).transport == "rdma"
    assert packets_sent(workers_port) > before


def test_where_hardly_anything_may_be_pinned_weights_go_over_tcp(start_worker: StartWorker) -> None:
    source = start_worker("auto", launcher=PINS_LITTLE, seed=SEED).serve()
    target = Target("auto")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("write", "tcp", ())
    receiver = start_worker("auto", launcher=PINS_LITTLE)
    answer = receiver.ask(do="receive", sources=[asdict(start_worker("auto", seed=SEED).serve())])
    assert (answer["equal"], answer["transport"]) == (True, "tcp")


def test_rdma_mode_says_which_limit_forbids_it(start_worker: StartWorker) -> None:
    source = start_worker("rdma", seed=SEED).serve()
    answer = start_worker("rdma", launcher=PINS_LITTLE).ask(do="receive", sources=[asdict(source)])
    assert answer["error"] == "NixlError"
    assert f"RLIMIT_MEMLOCK allows {LIMIT_BYTES} bytes: set ulimit -l unlimited" in answer["message"]
