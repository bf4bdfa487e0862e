"""Agents that are made before they are needed: taken once, fenced when nobody takes them."""

from __future__ import annotations

import pytest

from mxcore.errors import NixlError, NixlMissing
from mxcore.nixl.agent import live_agents
from mxcore.settings import load_settings
from mxcore.transfer.move import AgentSession, SessionAhead
from mxcore.transfer.route import UcxPolicy
from mxcore.transfer.route.routes import Transport
from tests.transfer.conftest import wait_for

TLS = "tcp,self"


def ahead(made: list[AgentSession], **changes: object) -> SessionAhead:
    return SessionAhead(load_settings(changes, {}), "worker", TLS, False, prepare=made.append)


def test_the_one_made_ahead_is_taken_once() -> None:
    made: list[AgentSession] = []
    sessions = ahead(made)
    sessions.start()
    sessions.start()
    wait_for(lambda: made)
    first, second = sessions.take(TLS), sessions.take(TLS)
    assert made == [first, second]
    assert first.name != second.name
    sessions.drop()
    assert not first.fenced
    first.fence()
    second.fence()


def test_what_nobody_took_is_fenced() -> None:
    made: list[AgentSession] = []
    sessions = ahead(made)
    sessions.start()
    sessions.drop()
    sessions.drop()
    assert [session.fenced for session in made] == [True]
    assert live_agents() == 0


def test_another_transport_gets_a_session_of_its_own() -> None:
    made: list[AgentSession] = []
    sessions = ahead(made)
    sessions.start()
    others = [sessions.take("tcp,cma,self"), sessions.take(TLS, True)]  # or another kind of progress
    wait_for(lambda: len(made) == 3)  # the one made ahead may be the last
    for other in others:
        other.fence()
    sessions.drop()
    assert all(session.fenced for session in made)


def test_without_a_start_it_is_made_when_it_is_taken() -> None:
    made: list[AgentSession] = []
    sessions = ahead(made)
    sessions.drop()
    assert made == []
    sessions.take(TLS).fence()
    assert len(made) == 1


def test_a_failure_is_told_to_whoever_needs_one() -> None:
    sessions = ahead([], MX_NIXL_BACKEND="NO_SUCH_PLUGIN")
    sessions.start()
    with pytest.raises((NixlMissing, NixlError), match="NO_SUCH_PLUGIN"):
        sessions.take(TLS)
    sessions.drop()


def test_a_session_that_cannot_be_prepared_is_fenced() -> None:
    def refuse(session: AgentSession) -> None:
        raise NixlError("no memory to register")

    sessions = SessionAhead(load_settings({}, {}), "worker", TLS, False, prepare=refuse)
    sessions.start()
    with pytest.raises(NixlError, match="no memory"):
        sessions.take(TLS)
    sessions.drop()
    assert live_agents() == 0


@pytest.mark.parametrize(
    ("transport", "same_host", "tls", "by_nixl"),
    [
        ("tcp", True, None, "tcp,self"),
        ("auto", True, None, None),
        ("auto", False, None, "^cma,knem,xpmem"),
        ("same-host", True, None, None),
        ("rdma", False, "^tcp,sysv,posix", "^tcp,sysv,posix"),
    ],
)
def test_what_a_receiver_will_most_likely_need(
    transport: Transport, same_host: bool, tls: str | None, by_nixl: str | None
) -> None:
    assert UcxPolicy.from_environment(transport, {}).likely_tls(same_host=same_host) == tls
    policy = UcxPolicy.from_environment(transport, {}, tcp_transfer="nixl")
    assert policy.likely_tls(same_host=same_host) == by_nixl
