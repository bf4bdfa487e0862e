"""What goes wrong over real verbs: wires, ports, holders in mid transfer; RDMA that gets nowhere; memory unpinned."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict

import pytest

from mxcore.errors import ChunksMissing
from mxcore.transfer.move import Source
from mxcore.transfer.receive.receiver import FindMore
from tests.rdma.conftest import ENDS, Wire, packets_sent
from tests.transfer.conftest import StartWorker
from tests.transfer.memory import HostTensors, model_specs
from tests.transfer.test_exchange import SEED, Target, failing

pytestmark = pytest.mark.rdma
LIMIT_BYTES = 8 << 20
PINS_LITTLE = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", f"--memlock={LIMIT_BYTES}")


def found_after(target: Target, fault: Callable[[], None], *sources: Source) -> FindMore:
    """`fault` at the target's first chunk; `sources` are listed after it."""
    struck: list[Source] = []

    def strike() -> None:
        fault()
        struck.extend(sources)

    target.at_first_chunk.append(strike)
    return lambda: list(struck)


def test_a_cut_wire_is_noticed_by_the_port_and_costs_what_was_in_flight(start_worker: StartWorker, wire: Wire) -> None:
    source = start_worker("rdma", seed=SEED, megabytes=20).serve()
    target = Target("rdma", model_specs(20))
    target.at_first_chunk.append(wire.cut)
    with failing(ChunksMissing, source.worker_id, "a read with"):  # UCX said so; a stall takes longer
        target.receive(source)
    wire.mend()
    target.receive(source)
    assert target.is_right()


@pytest.mark.parametrize("end", ENDS)
def test_a_port_that_goes_down_costs_what_was_in_flight(start_worker: StartWorker, wire: Wire, end: str) -> None:
    slow = {"MX_SOURCE_RATE_LIMIT": "4MB"}  # so that it is not done before the other one is given up on
    over_rdma = start_worker("auto", seed=SEED, megabytes=20)
    by_tcp = start_worker("tcp", environ=slow, seed=SEED, megabytes=20)
    sources = [over_rdma.serve(), by_tcp.serve()]
    target = Target("auto", model_specs(20))
    found = found_after(target, lambda: wire.take_down(end), sources[1])
    report = target.receive(sources[0], find_more=found)
    assert target.is_right()
    assert set(report.bytes_from) == {source.worker_id for source in sources}
    assert any(sources[0].worker_id in failure for failure in report.failures)
    wire.mend()
    # Not of the same holder: on Soft-RoCE its UCX may end it (docs/explanation/swarm.md, what cannot be covered).
    again = Target("auto")
    assert again.receive(start_worker("auto", seed=SEED).serve()).transport == "rdma"  # this process, the same ports
    assert again.is_right()


def test_what_a_port_that_is_down_did_not_bring_comes_from_elsewhere(start_worker: StartWorker, wire: Wire) -> None:
    source = start_worker("rdma", seed=SEED, megabytes=20).serve()
    target = Target("rdma", model_specs(20))
    target.at_first_chunk.append(lambda: wire.take_down("mxa"))
    with pytest.raises(ChunksMissing, match=source.worker_id) as raised:
        target.receive(source)
    partial = raised.value.partial
    assert partial is not None
    missing = partial.missing_bytes
    files = HostTensors(target.tensors.specs, SEED)  # as if from storage
    assert target.tensors.copy_from(files, partial.missing_stretches()) == missing > 0
    report = partial.complete()
    assert target.is_right()
    assert (report.bytes_from, report.bytes_otherwise) == ({source.worker_id: report.bytes - missing}, missing)


def test_a_stopped_holder_costs_what_it_was_not_asked_for_yet(start_worker: StartWorker) -> None:
    stopped, other = (start_worker("rdma", seed=SEED, megabytes=20) for _ in range(2))
    sources = [stopped.serve(), other.serve()]
    target = Target("rdma", model_specs(20), MX_SERVER_TIMEOUT_SECS=8)
    found = found_after(target, lambda: stopped.kill(signal.SIGSTOP), sources[1])
    report = target.receive(sources[0], find_more=found)
    assert target.is_right()
    assert set(report.bytes_from) == {source.worker_id for source in sources}
    stopped.kill(signal.SIGCONT)
    again = Target("rdma", model_specs(20))
    again.receive(sources[0])
    assert again.is_right()


def test_a_holder_that_rdma_does_not_reach_sends_over_tcp(
    start_worker: StartWorker, wire: Wire, workers_port: str
) -> None:
    source = start_worker("auto", seed=SEED).serve()
    wire.cut()
    target = Target("auto")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("send", "tcp", ())
    wire.mend()
    before = packets_sent(workers_port)
    assert Target("auto").receive(source).transport == "rdma"
    assert packets_sent(workers_port) > before


def test_where_hardly_anything_may_be_pinned_weights_go_over_tcp(start_worker: StartWorker) -> None:
    source = start_worker("auto", launcher=PINS_LITTLE, seed=SEED).serve()
    target = Target("auto")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("send", "tcp", ())
    receiver = start_worker("auto", launcher=PINS_LITTLE)
    answer = receiver.ask(do="receive", sources=[asdict(start_worker("auto", seed=SEED).serve())])
    assert (answer["equal"], answer["transport"]) == (True, "tcp")


def test_rdma_mode_says_which_limit_forbids_it(start_worker: StartWorker) -> None:
    source = start_worker("rdma", seed=SEED).serve()
    answer = start_worker("rdma", launcher=PINS_LITTLE).ask(do="receive", sources=[asdict(source)])
    assert answer["error"] == "NixlError"
    assert f"RLIMIT_MEMLOCK allows {LIMIT_BYTES} bytes: set ulimit -l unlimited" in answer["message"]
