"""A receiver's memory is registered for few holders at a time, by real agents; others take their places."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mxbench.fleet.fleet import BY_NIXL
from mxcore.errors import NixlError, SourceBusy
from mxcore.nixl.agent import live_agents
from mxcore.settings import load_settings
from mxcore.transfer.move import AgentSession, RegisteredSessions, SessionAhead
from mxcore.transfer.move.registered_sessions import MOST_REGISTRATIONS
from tests.transfer.conftest import StartWorker
from tests.transfer.memory import model_specs
from tests.transfer.test_exchange import SEED, Target

TLS = "tcp,self"


@pytest.fixture
def sessions() -> Iterator[RegisteredSessions]:
    made = RegisteredSessions(SessionAhead(load_settings({}, {}), "worker", TLS, False), 2)
    yield made
    made.drop()


def test_whoever_finds_none_is_asked_once_one_has_ended(sessions: RegisteredSessions) -> None:
    first, second = sessions.take(TLS, "a"), sessions.take(TLS, "b")
    assert not sessions.wanted
    with pytest.raises(SourceBusy, match="registered 2 times"):
        sessions.take(TLS, "c")
    assert sessions.wanted
    assert (sessions.may_take("c"), sessions.may_take("a")) == (False, True)
    sessions.fence(first)
    assert first.fenced
    assert sessions.may_take("c")
    third = sessions.take(TLS, "c")
    for session in (second, third):
        sessions.fence(session)
    assert live_agents() == 0


def test_memory_that_cannot_be_registered_once_more(
    sessions: RegisteredSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sessions.take(TLS, "a")

    def full(*args: Any, **options: Any) -> AgentSession:
        raise NixlError("registering failed: no more of BAR1")

    with monkeypatch.context() as patched:
        patched.setattr(SessionAhead, "take", full)
        with pytest.raises(SourceBusy, match="BAR1"):
            sessions.take(TLS, "b")
        assert not sessions.may_take("b")
        sessions.fence(first)
        with pytest.raises(NixlError, match="BAR1"):  # nobody else gives: this is a failure
            sessions.take(TLS, "b")
    sessions.fence(sessions.take(TLS, "b"))


def test_a_receive_registers_few_times_at_once_and_uses_all_holders_that_it_needs(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [start_worker(BY_NIXL, seed=SEED, megabytes=40) for _ in range(MOST_REGISTRATIONS + 1)]
    sources = {worker: worker.serve() for worker in workers}
    lock, now, most = threading.Lock(), [0], [0]
    take, fence = RegisteredSessions.take, RegisteredSessions.fence

    def counted(sessions: RegisteredSessions, tls: str, holder: str) -> AgentSession:
        session = take(sessions, tls, holder)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        return session

    def ended(sessions: RegisteredSessions, session: AgentSession) -> None:
        fence(sessions, session)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(RegisteredSessions, "take", counted)
    monkeypatch.setattr(RegisteredSessions, "fence", ended)
    target = Target(BY_NIXL, model_specs(40))
    target.at_first_chunk.append(lambda: workers[0].kill())
    target.at_first_chunk.append(lambda: workers[1].kill())
    report = target.receive(*sources.values())
    assert target.is_right()
    assert sources[workers[2]].worker_id in report.bytes_from
    assert most[0] <= MOST_REGISTRATIONS
