"""A holder that drips: its chunks go to others while there is more to do, and it is not given up for good."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mxcore.errors import ChunksMissing, SourceSlow
from mxcore.transfer.layout import plan
from mxcore.transfer.move import ChunkTls, SourceClient, cut_off, tcp
from tests.transfer.conftest import StartWorker
from tests.transfer.test_exchange import SEED, Target

_DRIP_BYTES, _DRIP_SECONDS = 64, 0.02


class Drip:
    """Stands between a receiver and a chunk port, and lets through a few bytes at a time."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._far = socket.create_connection(("127.0.0.1", port))
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        self._threads.append(threading.Thread(target=self._forward, args=(near,)))
        self._threads[-1].start()
        with suppress(OSError), near:
            while not self._over.wait(_DRIP_SECONDS) and (data := self._far.recv(_DRIP_BYTES)):
                near.sendall(data)
        cut_off(self._far)

    def _forward(self, near: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                self._far.sendall(data)
        self._over.set()
        cut_off(self._far)

    def close(self) -> None:
        cut_off(self._far)
        for thread in self._threads:
            thread.join()
        self._far.close()
        self._listener.close()


@pytest.fixture
def drips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, list[Drip]]]]:
    """The worker that drips is put in here."""
    slow: list[tuple[str, list[Drip]]] = []
    real = tcp._connect

    def connect(client: SourceClient, port: int, token: bytes, tls: ChunkTls | None) -> socket.socket:
        for name, made in slow:
            if client.source.worker_id == name:
                made.append(Drip(port))
                port = made[-1].port
        return real(client, port, token, tls)

    monkeypatch.setattr(tcp, "_connect", connect)
    yield slow
    for _, made in slow:
        for drip in made:
            drip.close()


def test_a_holder_that_drips_loses_its_chunks_to_another(
    start_worker: StartWorker, drips: list[tuple[str, list[Drip]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends all the time, so that it never stalls. The other has all but begins after it."""
    monkeypatch.setattr(plan, "_SLOW_SECONDS", 0.3)
    dripping, other = (start_worker("tcp", seed=SEED).serve() for _ in range(2))
    drips.append((dripping.worker_id, []))
    monkeypatch.setattr(tcp, "connections_of", lambda cores, *, by_tls: 1)
    target = Target("tcp")

    def listed() -> list[object]:
        return [other] if drips[0][1] else []

    report = target.receive(dripping, find_more=listed)  # type: ignore[arg-type]
    assert target.is_right()
    assert report.bytes_from == {other.worker_id: report.bytes}
    assert report.bytes_again > 0
    assert any("MX_SOURCE_SLOW" in failure for failure in report.failures)


def test_a_sole_holder_that_drips_ends_as_a_straggler(
    start_worker: StartWorker, drips: list[tuple[str, list[Drip]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends all the time, and there is nobody to compare it with; what comes next has what it gave."""
    monkeypatch.setattr(plan, "_DRIP_SECONDS", 0.3)
    monkeypatch.setattr(plan, "_DRIP_REST_SECONDS", 0.3)
    dripping = start_worker("tcp", seed=SEED).serve()
    drips.append((dripping.worker_id, []))
    monkeypatch.setattr(tcp, "connections_of", lambda cores, *, by_tls: 1)
    target = Target("tcp")
    with pytest.raises(ChunksMissing, match="less than 1 MB/s from all holders") as caught:
        target.receive(dripping)
    assert [type(failure) for failure in caught.value.failures] == [SourceSlow]


def test_holders_that_give_enough_together_are_kept_and_those_that_do_not_are_told() -> None:
    """By the plan's own clock: 0.6 MB/s of each of two holders, then of one alone, then a source that rests."""
    swarm = plan.SwarmPlan(1000, 100_000)
    for name in ("a", "b"):
        swarm.add_holder(name, plan.all_chunks(1000))
    swarm.claim("a", [0], 0.0)
    swarm.claim("b", [1], 0.0)
    for turn in range(1, 91):
        now = turn / 6
        for place, name in enumerate("ab"):
            swarm.claim(name, [2 * turn + place], now)
            swarm.done(name, 2 * (turn - 1) + place, now)
        assert not swarm.drips(now)
    assert swarm.drop_holder("b")
    told = []
    for turn in range(91, 300):
        now = turn / 6
        swarm.claim("a", [2 * turn], now)
        swarm.done("a", 2 * (turn - 1), now)
        told.append(swarm.drips(now))
    assert any(told)
    swarm.done("a", 2 * 299, now)
    swarm.claim("a", [999], now + 1000)
    assert not swarm.drips(now + 1009)
