"""READs over real verbs: by which way they go, without the holder's help, and until when they land."""

from __future__ import annotations

import signal

import pytest

from mxcore.cli.doctor import machine as doctor_machine
from mxcore.errors import NixlError
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from tests.rdma.conftest import Wire, packets_sent
from tests.rdma.opened_read import changed, opened_read, snapshot
from tests.transfer.conftest import RDMA_PORTS, StartWorker, wait_for
from tests.transfer.memory import HostTensors, Spec, identity, model_specs
from tests.transfer.test_exchange import SEED, Target, settings

pytestmark = pytest.mark.rdma
PACKET_BYTES = 1024


@pytest.mark.parametrize(("receiver", "holder"), [("auto", "auto"), ("rdma", "rdma"), ("auto", "rdma")])
def test_the_bytes_go_over_the_ports(start_worker: StartWorker, workers_port: str, receiver: str, holder: str) -> None:
    source = start_worker(holder, seed=SEED).serve()
    target = Target(receiver)
    before = packets_sent(workers_port)
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("read", "rdma", ())
    assert packets_sent(workers_port) - before >= report.bytes // PACKET_BYTES


def test_a_holder_without_rdma_sends(start_worker: StartWorker, workers_port: str) -> None:
    source = start_worker("tcp", seed=SEED).serve()
    before = packets_sent(workers_port)
    report = Target("auto").receive(source)
    assert (report.operation, report.transport) == ("send", "tcp")
    assert packets_sent(workers_port) == before


def test_a_stopped_holder_is_read_all_the_same(start_worker: StartWorker) -> None:
    worker = start_worker("auto", seed=SEED)
    target = Target("auto")
    with opened_read(worker.serve(), target) as read:
        assert read.run(read.moves[:1]) == [0]  # the two are connected, for which the holder is needed
        worker.kill(signal.SIGSTOP)
        rest = read.run(read.moves[1:])
        worker.kill(signal.SIGCONT)
    assert sorted(rest) == [move.chunk for move in read.moves[1:]]
    assert target.is_right()


def test_what_was_given_up_on_lands_until_the_fence(start_worker: StartWorker, wire: Wire) -> None:
    source = start_worker("auto", seed=SEED, megabytes=20).serve()
    target = Target("auto", model_specs(20))
    with opened_read(source, target) as read:
        read.run(read.moves[:1])
        wire.slow()
        posted = [read.session.post("read", move, read.peer)[0] for move in read.moves[1:]]
        for transfer in posted:
            transfer.release()
        del posted, transfer
        released = snapshot(target)
        wait_for(lambda: changed(target, released))  # releasing is no fence
        read.session.fence()
        fenced = snapshot(target)
        wire.mend()
    other = Target("auto", model_specs(20))
    other.receive(source)  # time enough for anything that were still under way
    assert other.is_right()
    assert changed(target, fenced) == []
    assert not target.is_right()  # there was something left to come


def test_many_regions_in_many_descriptors(monkeypatch: pytest.MonkeyPatch, workers_port: str) -> None:
    monkeypatch.setenv("UCX_TLS", "rc")  # both are in this process, where UCX would find a shorter way
    specs = [Spec(f"t{i}", "torch.int8", 1, (3000 + i,), f"s{i}") for i in range(600)]
    weights = HostTensors(specs, SEED)
    layout, placement = build_layout("raw", weights.local_tensors())
    member = Membership(settings("rdma", MX_WORKER_GRPC_PORT=0), identity(), 0, "cpu", chunk_bytes=65536)
    member.serve(layout, placement, {}, keep_alive=weights)
    source = Source(member.source_id, member.worker_id, 0, member.endpoint or "")
    target = Target("rdma", specs)
    before = packets_sent(RDMA_PORTS[-1])
    report = target.receive(source)
    assert target.is_right()
    assert report.transport == "rdma"
    assert packets_sent(RDMA_PORTS[-1]) - before >= report.bytes // PACKET_BYTES
    with opened_read(source, target) as read:
        read.run(read.moves[:1])
        member.close()  # its agent, and with it what is registered
        with pytest.raises(NixlError):
            read.run(read.moves[1:])


def test_the_doctor_names_the_port() -> None:
    finding = doctor_machine.rdma()
    assert finding.state == "ok"
    assert finding.fact.endswith(f"weights are READ over {RDMA_PORTS[-1]}")
