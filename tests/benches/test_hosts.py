"""The agent on another machine: what it starts, what it refuses, and that nothing outlives its connection."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

from mxbench.cluster.hosts_file import HostLine, parse_hosts
from mxbench.hosts import Host, HostError, finish, listen, over_socket, over_ssh, started_here
from mxbench.hosts.agent import Agent
from mxbench.link import socket_rate

TAKE = {"role": "take", "address": "127.0.0.1", "connections": 1}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host("here", "127.0.0.1", started_here()) as made:
        yield made


def children_of(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").glob("*") for child in (task / "children").read_text().split()]


def test_two_ends_give_a_rate(host: Host) -> None:
    rate = socket_rate(host, host, 2, 0.05)
    assert rate.gbps > 0
    assert rate.giver_cpu_seconds_per_gb > 0 < rate.taker_cpu_seconds_per_gb


def test_a_process_that_is_killed_has_ended(host: Host) -> None:
    child = host.spawn("sockets", TAKE)
    child.expect("listening")
    child.signal(signal.SIGKILL)
    with pytest.raises(HostError, match=r"sockets on here: it ended with -9 \(without a word\) instead of 'took'"):
        child.expect("took")


def test_what_a_process_says_at_its_end_is_told(host: Host) -> None:
    with pytest.raises(HostError, match=r"ended with 1 \(KeyError: 'address'\)"):
        host.spawn("sockets", {"role": "take"}).expect("listening")


def test_a_deadline_ends_every_wait(host: Host) -> None:
    child = host.spawn("sockets", TAKE)
    child.expect("listening")
    host.deadline = time.monotonic()
    try:
        with pytest.raises(HostError, match="no 'took' within 0 s"):
            child.expect("took")
        with pytest.raises(HostError, match="had not 1 bytes"):
            child.until(1)
    finally:
        host.deadline = float("inf")
        child.end()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"do": "spawn", "child": "x", "program": "sh", "task": {}}, "no program 'sh'"),
        (
            {"do": "spawn", "child": "x", "program": "sockets", "task": {}, "environ": {"PATH": "/"}},
            "PATH is no setting",
        ),
        ({"do": "dance"}, "no request 'dance'"),
        ({"do": "send", "child": "nobody", "line": ""}, "KeyError"),
        ({"do": "spawn"}, "KeyError"),
    ],
)
def test_what_an_agent_refuses(told: dict[str, Any], why: str) -> None:
    said: list[dict[str, Any]] = []
    agent = Agent(said.append)
    agent.take(told)
    agent.close()
    [answer] = said
    assert why in answer["refused"]


@contextmanager
def a_port_that_listens() -> Iterator[tuple[int, threading.Event]]:
    """Its number, and what is set when somebody has left; it listens until the end, and has ended then."""
    said: list[str] = []
    listening, left = threading.Event(), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        listening.set()
        if line.endswith("has left"):
            left.set()

    serving = threading.Thread(target=listen, args=("127.0.0.1", 0, say), kwargs={"until_finished": True})
    serving.start()
    assert listening.wait(30)
    port = int(said[0].rpartition(":")[2])
    yield port, left
    finish("127.0.0.1", port)
    serving.join(30)
    assert not serving.is_alive()


def test_processes_end_with_the_connection_and_the_port_serves_on() -> None:
    with a_port_that_listens() as (port, left):
        channel = over_socket("127.0.0.1", port)
        host = Host("there", channel.there, channel)
        host.spawn("sockets", TAKE).expect("listening")
        before = set(children_of(os.getpid()))
        assert before
        channel.close()  # as a machine that vanishes: nothing is said before
        assert left.wait(30)
        assert not any(
            Path(f"/proc/{child}/cmdline").read_bytes().count(b"socket_end") for child in children_of(os.getpid())
        )
        host.close()
        again = over_socket("127.0.0.1", port)
        with Host("there", again.there, again) as second:
            assert second.machine()["cores"] >= 1


def test_the_port_serves_on_after_one_who_left_while_it_was_answered() -> None:
    """A reset: answers that wait to be written cannot be."""
    with a_port_that_listens() as (port, left):
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.recv(100)
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b'{"do": "nothing"}\n' * 1000)
        assert left.wait(30)
        again = over_socket("127.0.0.1", port)
        with Host("there", again.there, again) as second:
            assert second.machine()["cores"] >= 1


def test_who_cannot_be_reached_is_named() -> None:
    with pytest.raises(HostError, match=r"nobody listens at 127\.0\.0\.1:1 .*mx bench peer --listen"):
        over_socket("127.0.0.1", 1)
    with pytest.raises(HostError, match="n1: no agent answers there"):
        Host("n1", "", over_ssh("-oProxyCommand=none", sys.executable))  # no option: it stands behind --
    with pytest.raises(HostError, match="n2: no agent answers there"):
        Host("n2", "", started_here("/bin/false"))


def test_a_hosts_file() -> None:
    text = (
        "# machines\na ssh=me@a1 python=/opt/py address=10.0.0.1\n\nb\n"
        "c agent=c1:7000\nd agent=d1\ne here address=10.0.0.5\n"
    )
    assert parse_hosts(text) == [
        HostLine("a", "10.0.0.1", ssh="me@a1", python="/opt/py"),
        HostLine("b", "b", ssh="b"),
        HostLine("c", "c1", agent="c1:7000"),
        HostLine("d", "d1", agent="d1:6570"),
        HostLine("e", "10.0.0.5"),
    ]
    assert parse_hosts("a ssh=me@a1\nb")[0].address == "a1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names 0 machines"),
        ("a", "names 1 machines"),
        ("a\na", "line 2: a is there twice"),
        ("a\nb color=red", "line 2: 'color=red' is none of"),
        ("a\nb ssh=", "'ssh=' is none of"),
        ("a here ssh=x\nb", "exclude each other"),
        ("a agent=x:y\nb", "no HOST:PORT"),
    ],
)
def test_what_is_wrong_in_a_hosts_file(text: str, why: str) -> None:
    with pytest.raises(click.UsageError, match=why):
        parse_hosts(text)
