"""Real transfers between real processes: both operations, refusals, faults on either side."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest

from mxbench.fleet.fleet import BY_NIXL, settings_of
from mxcore.errors import (
    ChunksMissing,
    LayoutMismatch,
    SourceRefused,
    SourceUnreachable,
    TransferError,
    TransferStalled,
)
from mxcore.nixl.agent import live_agents
from mxcore.process import AttachedReads
from mxcore.settings import WorkerSettings, load_settings
from mxcore.transfer.layout import LocalTensor, build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxcore.transfer.move import same_host as attached_pull
from mxcore.transfer.receive import Receiver
from mxcore.transfer.receive.receiver import FindMore
from tests.transfer.conftest import StartWorker
from tests.transfer.fleet_member import PATIENT_SECONDS
from tests.transfer.memory import HostTensors, Spec, identity, model_specs

CHUNK_BYTES = 65536
SEED = 7
RDMA = pytest.param("rdma", marks=pytest.mark.rdma)
TRANSPORTS = [
    ("tcp", "send", "tcp"),
    (BY_NIXL, "write", "tcp"),
    ("same-host", "read", "same-host"),
    ("auto", "read", "same-host"),
    pytest.param("rdma", "read", "rdma", marks=pytest.mark.rdma),
]
LARGE_MEGABYTES = {"rdma": 20}  # the machine of `make test-rdma` moves about 20 MB a second


def large(transport: str) -> int:
    """Megabytes of a model that is still on its way when the test does what it does."""
    return LARGE_MEGABYTES.get(transport, 200)


def settings(transport: str, **changes: Any) -> WorkerSettings:
    return load_settings({**settings_of(transport), "MX_STALL_TIMEOUT_SECS": PATIENT_SECONDS, **changes}, {})


class Target:
    """The receiving side in this process."""

    def __init__(self, transport: str, specs: list[Spec] | None = None, **changes: Any) -> None:
        self.tensors = HostTensors(specs or model_specs(), None)
        self.layout, self.placement = build_layout("raw", self.tensors.local_tensors())
        self.settings = settings(transport, **changes)
        self.seen: list[int] = []
        self.at_first_chunk: list[Any] = []  # called once, when the first chunk is verified
        self.scalar_names: list[str] = []

    def receive(self, *sources: Source, find_more: FindMore | None = None) -> Any:
        def progress(done: int, total: int) -> None:
            assert total == self.layout.total_bytes
            self.seen.append(done)
            while self.at_first_chunk:
                self.at_first_chunk.pop()()

        receiver = Receiver(
            self.layout,
            self.placement,
            settings=self.settings,
            worker_id="target",
            scalar_names=self.scalar_names,
            progress=progress,
            chunk_bytes=CHUNK_BYTES,
        )
        return receiver.receive(sources, find_more)

    def is_right(self, seed: int = SEED) -> bool:
        return self.tensors.equal_bytes(HostTensors(self.tensors.specs, seed))


@contextmanager
def failing(error: type[TransferError], *said: str) -> Iterator[None]:
    with pytest.raises(error) as raised:
        yield
    for text in said:
        assert text in str(raised.value)
    assert live_agents() == 0  # fenced


@pytest.mark.parametrize(("transport", "operation", "named"), TRANSPORTS)
def test_every_kind_of_tensor_arrives(start_worker: StartWorker, transport: str, operation: str, named: str) -> None:
    source = start_worker(transport, seed=SEED).serve(scalars={"k_scale": 0.5})
    target = Target(transport)
    target.scalar_names = ["k_scale"]
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport) == (operation, named)
    assert report.bytes == target.layout.total_bytes == target.seen[-1]
    assert report.tensors == len(model_specs())
    assert report.chunks_verified == len(report.digests.values) // 8 == -(-report.bytes // CHUNK_BYTES)
    assert report.scalars == {"k_scale": 0.5}
    assert report.source_worker_id == source.worker_id
    assert report.gigabytes_per_second > 0
    assert report.failures == ()


@pytest.mark.parametrize(("transport", "operation"), [("tcp", "send"), ("same-host", "read")])
@pytest.mark.parametrize("lack", ["no card", "RDMA alone, and no card", "no NIXL"])
def test_no_agent_is_made_where_nobody_needs_one(
    start_worker: StartWorker, transport: str, operation: str, lack: str
) -> None:
    environ = {
        "no card": {"UCX_NET_DEVICES": "mlx5_0:1"},
        "RDMA alone, and no card": {"UCX_TLS": "rc,cuda_copy,cuda_ipc"},
        "no NIXL": {},
    }[lack]
    hidden = lack == "no NIXL"
    first, second = (start_worker(transport, environ, seed=seed, without_nixl=hidden) for seed in (SEED, None))
    received = second.ask(do="receive", sources=[asdict(first.serve())])
    if "UCX_TLS" not in environ:
        assert received["operation"] == operation
    assert (received["equal"], received["agents"]) == (True, 0)
    assert second.serve().endpoint  # and it serves on
    assert [worker.ask(do="nixl") for worker in (first, second)] == 2 * [{"found": not hidden, "agents": 0}]


def test_a_layout_without_bytes_is_received_at_once(start_worker: StartWorker) -> None:
    target = Target("tcp")
    source = start_worker("tcp", seed=SEED).serve()
    with failing(LayoutMismatch):
        Target("tcp", [Spec("nothing", "torch.int8", 1, (0,), "nothing")]).receive(source)
    assert target.receive(source).chunks_verified > 0


def test_a_receiver_on_another_transport_than_its_holder(start_worker: StartWorker) -> None:
    source = start_worker("tcp", seed=SEED).serve()  # no CMA there: the probe is not even offered
    target = Target("auto")
    assert target.receive(source).operation == "send"
    assert target.is_right()
    source = start_worker("auto", seed=SEED).serve()
    target = Target("tcp")
    assert target.receive(source).operation == "send"
    assert target.is_right()


def test_another_layout_is_refused_with_names(start_worker: StartWorker) -> None:
    source = start_worker("tcp", seed=SEED).serve()
    specs = model_specs()
    specs[0] = replace(specs[0], dtype="torch.float16")
    specs[-1] = replace(specs[-1], name="two")
    with failing(LayoutMismatch, "layers.0.weight: dtype torch.float16 here, torch.bfloat16 there", "one: only there"):
        Target("tcp", specs).receive(source)
    with failing(LayoutMismatch, "and 12 more"):
        Target("tcp", [replace(spec, dtype="torch.int64", itemsize=8) for spec in model_specs()]).receive(source)


def test_other_scalars_are_refused_with_names(start_worker: StartWorker) -> None:
    source = start_worker("tcp", seed=SEED).serve(scalars={"theirs": 1.0})
    target = Target("tcp")
    target.scalar_names = ["ours"]
    with failing(LayoutMismatch, "['ours']", "['theirs']"):
        target.receive(source)


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL, "same-host", RDMA])
def test_a_flipped_bit_is_refused_and_another_source_serves(start_worker: StartWorker, transport: str) -> None:
    bad_worker, good_worker = (start_worker(transport, seed=SEED, without_self_check=True) for _ in range(2))
    bad, good = bad_worker.serve(), good_worker.serve()
    bad_worker.ask(do="flip", storage="layer3", offset=123_456)
    with failing(ChunksMissing, "MX_DIGEST_MISMATCH", bad.worker_id):
        Target(transport).receive(bad)
    target = Target(transport)
    report = target.receive(bad, good)
    assert target.is_right()
    assert good.worker_id in report.bytes_from
    assert all("MX_DIGEST_MISMATCH" in failure for failure in report.failures)  # none: the good one gave that chunk
    assert target.seen == sorted(target.seen)  # what was verified stayed


def test_other_bytes_under_the_same_layout_are_taken_of_nobody(start_worker: StartWorker) -> None:
    sources = [start_worker("tcp", seed=seed).serve() for seed in (1, SEED)]
    with failing(ChunksMissing, "different bytes"):
        Target("tcp").receive(*sources)


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL, "same-host", RDMA])
def test_a_holder_killed_in_mid_transfer_is_an_error_and_no_crash(start_worker: StartWorker, transport: str) -> None:
    worker = start_worker(transport, seed=SEED, megabytes=large(transport))
    target = Target(transport, model_specs(large(transport)))
    source = worker.serve()
    target.at_first_chunk.append(worker.kill)
    with failing(TransferError):
        target.receive(source)
    again = start_worker(transport, seed=SEED, megabytes=large(transport)).serve()
    target.receive(again)
    assert target.is_right()


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL, "same-host", RDMA])
def test_a_transfer_goes_on_at_the_next_holder(start_worker: StartWorker, transport: str) -> None:
    dying = start_worker(transport, seed=SEED, megabytes=large(transport) // 4)
    sources = [dying.serve(), start_worker(transport, seed=SEED, megabytes=large(transport) // 4).serve()]
    target = Target(transport, model_specs(large(transport) // 4))
    target.at_first_chunk.append(dying.kill)
    report = target.receive(*sources)
    assert target.is_right()
    assert sources[1].worker_id in report.bytes_from
    assert target.seen == sorted(set(target.seen))  # no chunk was verified twice


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL])
def test_a_stopped_holder_is_given_up_on(start_worker: StartWorker, transport: str) -> None:
    worker = start_worker(transport, seed=SEED, megabytes=200)
    source = worker.serve()
    target = Target(transport, model_specs(200), MX_SERVER_TIMEOUT_SECS=2, MX_STALL_TIMEOUT_SECS=1)
    target.at_first_chunk.append(lambda: worker.kill(signal.SIGSTOP))
    with failing(ChunksMissing, source.worker_id):
        target.receive(source)
    before = {name: storage.copy() for name, storage in target.tensors.storages.items()}
    worker.kill(signal.SIGCONT)
    assert worker.ask(do="cpu")["process_seconds"] > 0  # it runs again, and whatever it still sends is not let in
    for name, storage in target.tensors.storages.items():
        assert (storage == before[name]).all(), name


def test_a_holder_that_is_stopped_before_the_transfer(start_worker: StartWorker) -> None:
    worker = start_worker("tcp", seed=SEED)
    source = worker.serve()
    worker.kill(signal.SIGSTOP)
    with failing(SourceUnreachable, "DEADLINE_EXCEEDED"):
        Target("tcp", MX_SERVER_TIMEOUT_SECS=0.5).receive(source)


def test_nobody_there(start_worker: StartWorker) -> None:
    worker = start_worker("tcp", seed=SEED)
    source = worker.serve()
    worker.kill()
    with failing(SourceUnreachable, source.endpoint):
        Target("tcp").receive(source)
    with failing(SourceUnreachable, "no worker"):
        Target("tcp").receive()


def test_a_worker_that_is_somebody_else(start_worker: StartWorker) -> None:
    source = start_worker("tcp", seed=SEED).serve()
    with failing(SourceRefused, "FAILED_PRECONDITION", "not mine"):
        Target("tcp").receive(replace(source, source_id="0" * 16))
    with failing(SourceRefused, "FAILED_PRECONDITION", "not mine"):
        Target("tcp").receive(replace(source, worker_id="another"))


def test_a_transfer_that_takes_too_long_is_given_up_on(start_worker: StartWorker) -> None:
    source = start_worker("tcp", seed=SEED).serve()
    with failing(TransferStalled, "MX_TRANSFER_TIMEOUT"):
        Target("tcp", MX_TRANSFER_TIMEOUT=1e-9).receive(source)


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL, "same-host", RDMA])
def test_a_receiver_killed_in_mid_transfer_leaves_the_holder_well(start_worker: StartWorker, transport: str) -> None:
    holder = start_worker(transport, seed=SEED, megabytes=large(transport))
    source = holder.serve()
    for _ in range(3):
        receiver = start_worker(transport, megabytes=large(transport))
        paused = receiver.ask(do="receive", sources=[asdict(source)], pause_after_bytes=1)
        assert paused["paused_at"] < paused["total"]
        receiver.kill()
    assert holder.process.poll() is None
    target = Target(transport, model_specs(large(transport)))
    target.receive(source)
    assert target.is_right()


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL])
def test_a_stopped_receiver_does_not_stop_the_holder(start_worker: StartWorker, transport: str) -> None:
    holder = start_worker(transport, seed=SEED, megabytes=200, settings={"MX_STALL_TIMEOUT_SECS": 4})
    source = holder.serve()
    receiver = start_worker(transport, megabytes=200)
    receiver.ask(do="receive", sources=[asdict(source)], pause_after_bytes=1)
    receiver.kill(signal.SIGSTOP)
    target = Target(transport, model_specs(200))
    target.receive(source)
    assert target.is_right()
    assert holder.ask(do="drain", timeout_seconds=30)["drained"]  # its push was given up on, its lease has ended
    receiver.kill(signal.SIGKILL)


@pytest.mark.parametrize("transport", ["tcp", BY_NIXL, "same-host", RDMA])
def test_two_receivers_at_once(start_worker: StartWorker, transport: str) -> None:
    source = asdict(start_worker(transport, seed=SEED, megabytes=20).serve())
    receivers = [start_worker(transport, megabytes=20) for _ in range(2)]
    for receiver in receivers:
        receiver.ask(do="cpu")  # it has started: who is held up for two stall time-outs gives up
    for receiver in receivers:
        assert "paused_at" in receiver.ask(do="receive", sources=[source], pause_after_bytes=1)  # both are in it
    for receiver in receivers:
        receiver.send(do="go on")
    for receiver in receivers:
        answer = receiver.read()
        assert answer.get("equal"), answer


def test_memory_that_may_not_be_read_any_more_is_sent_instead(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(reads: AttachedReads, seconds: float) -> list[tuple[int, int, bytes]]:
        return [(key, errno.EPERM, b"") for key, _, _ in ended(reads, seconds)]

    ended = AttachedReads.ended
    monkeypatch.setattr(attached_pull, "AttachedReads", type("Denied", (AttachedReads,), {"ended": denied}))
    target = Target("auto")
    report = target.receive(start_worker("auto", seed=SEED).serve())
    assert target.is_right()
    assert (report.operation, report.transport) == ("send", "tcp")


def test_a_reader_that_fails_by_a_fault_of_ours_ends_the_transfer(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room for a list of addresses")

    monkeypatch.setattr(attached_pull, "AttachedReads", type("Broken", (AttachedReads,), {"ask": broken}))
    source = start_worker("same-host", seed=SEED).serve()
    with failing(SourceRefused, source.worker_id, "MemoryError: no room for a list of addresses"):
        Target("same-host").receive(source)


@pytest.mark.parametrize("transport", ["tcp", "same-host"])
def test_torch_tensors_of_every_dtype(start_worker: StartWorker, transport: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is the engine's")
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float32", "float64", "complex64")
    names += ("bool", "uint8", "int8", "int16", "int32", "int64")
    here, there = ({n: torch.zeros(33, 7, dtype=torch.uint8) for n in names} for _ in range(2))
    generator = torch.Generator().manual_seed(3)

    def local(tensors: dict[str, Any]) -> list[LocalTensor]:
        return [
            LocalTensor(
                name=name,
                dtype=str(view.dtype),
                shape=tuple(view.shape),
                stride=view.stride(),
                address=view.data_ptr(),
                itemsize_bytes=view.element_size(),
                storage_address=view.untyped_storage().data_ptr(),
                storage_bytes=view.untyped_storage().nbytes(),
                device_type="cpu",
                device_index=0,
            )
            for name, view in tensors.items()
        ]

    for tensors in (here, there):
        for name in names:
            tensors[name] = torch.zeros(33, 8, dtype=getattr(torch, name))[:, :7].t()
    for view in here.values():
        raw = view.untyped_storage()
        raw.copy_(torch.randint(0, 2, (raw.nbytes(),), dtype=torch.uint8, generator=generator).untyped_storage())
    layout, placement = build_layout("processed", local(here))
    member = Membership(settings(transport, MX_WORKER_GRPC_PORT=0), identity(), 0, "cpu", chunk_bytes=1024)
    member.serve(layout, placement, {}, keep_alive=here)
    source = Source(member.source_id, member.worker_id, 0, member.endpoint or "")
    layout, placement = build_layout("processed", local(there))
    receiver = Receiver(layout, placement, settings=settings(transport), worker_id="t", chunk_bytes=1024)
    receiver.receive([source])
    member.close()
    for name in names:
        assert torch.equal(here[name].contiguous().view(torch.uint8), there[name].contiguous().view(torch.uint8)), name
