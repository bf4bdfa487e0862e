"""The NIXL agent: two of them in this process, errors, lifetime, and what an idle one costs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxcore.errors import NixlError, NixlMissing, PeerLost
from mxcore.nixl import Mailbox, NixlAgent, Transfer, load_library
from mxcore.nixl.agent import live_agents, live_transfers
from mxcore.nixl.library import library_candidates
from mxcore.process import c_getenv
from mxcore.transfer.move import AgentSession, Move
from mxcore.transfer.route import ucx_settings
from tests.transfer.conftest import ROOT, StartWorker, wait_for

SIZE = 1 << 20


def q(*values: int) -> array[int]:
    return array("Q", values)


class Pair:
    """Two agents over TCP, each with one registered buffer; `a` knows `b`."""

    def __init__(self) -> None:
        with ucx_settings("tcp,self") as told:
            self.a, self.b = NixlAgent("a", backend_params=told), NixlAgent("b", backend_params=told)
        self.a_memory = np.zeros(SIZE, np.uint8)
        self.b_memory = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
        self.a_address, self.b_address = self.a_memory.ctypes.data, self.b_memory.ctypes.data
        self.a.register(q(self.a_address), q(SIZE))
        self.b.register(q(self.b_address), q(SIZE))
        assert self.a.load_remote(self.b.metadata()) == "b"

    def transfer(self, operation: str = "read", offset: int = 0, length: int = SIZE) -> Transfer:
        return self.a.transfer(operation, q(self.a_address + offset), q(self.b_address + offset), q(length), "b")

    def close(self) -> None:
        self.a.destroy()
        self.b.destroy()


@pytest.fixture
def pair() -> Iterator[Pair]:
    agents = Pair()
    yield agents
    agents.close()


def test_the_library_is_found_beside_the_wheel_without_importing_it() -> None:
    code = (
        "import sys; from mxcore.nixl.agent import load_library; path = load_library(); "
        "assert 'mesonpy.libs' in path, path; "
        "assert not any(name.partition('.')[0] in ('torch', 'nixl_cu12', 'nixl_cu13') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert load_library() in library_candidates()


def test_a_missing_library_says_where_it_was_looked_for(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        "from mxcore.nixl.agent import NixlAgent, live_agents; from mxcore.errors import NixlMissing\n"
        "try: NixlAgent('x')\n"
        "except NixlMissing as error: print(error, live_agents())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "nixl_cu12 and nixl_cu13" in result.stdout
    assert "libnixl_capi.so: cannot open shared object file" in result.stdout
    assert result.stdout.strip().endswith("[MX_NIXL_MISSING] 0")


def test_a_library_without_the_functions_is_named(tmp_path: Path) -> None:
    source = tmp_path / "stub.c"
    source.write_text("int nixl_capi_create_configured_agent(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-o", tmp_path / "libnixl_capi.so", source], check=True)
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        "from mxcore.nixl.agent import load_library; from mxcore.errors import NixlMissing\n"
        "try: load_library()\n"
        "except NixlMissing as error: print(error)\n"
    )
    environ = {"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, env=environ
    )
    assert "has no function nixl_capi_destroy_agent" in result.stdout


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bytes_move(pair: Pair, operation: str) -> None:
    pair.a_memory[:] = 7
    transfer = pair.transfer(operation)
    assert (transfer.operation, transfer.remote_agent) == (operation, "b")
    transfer.post()
    wait_for(transfer.done)
    assert (pair.a_memory == pair.b_memory).all()
    assert (pair.a_memory[0] == 7) == (operation == "write")


def test_what_ucx_was_told_holds_for_connections_made_when_its_environment_is_gone() -> None:
    before = sockets()
    agents = Pair()
    assert c_getenv("UCX_TCP_USER_TIMEOUT") is None
    transfer = agents.transfer()
    transfer.post()
    wait_for(transfer.done)
    timeouts = [timeout_milliseconds(number) for number in sockets() - before]
    agents.close()
    assert any(3990 <= timeout <= 4000 for timeout in timeouts)  # in the kernel's ticks; listening ones have none


def sockets() -> set[int]:
    """Descriptors of this process' sockets."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            if str(entry.readlink()).startswith("socket:"):
                found.add(int(entry.name))
    return found


def timeout_milliseconds(number: int) -> int:
    with socket.socket(fileno=os.dup(number)) as found:
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return 0
        return found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_many_descriptors(pair: Pair) -> None:
    offsets = np.arange(0, SIZE, 1024, dtype=np.uint64)
    lengths = np.full(len(offsets), 512, np.uint64)
    transfer = pair.a.transfer("read", pair.a_address + offsets, pair.b_address + offsets, lengths, "b")
    transfer.post()
    wait_for(transfer.done)
    rows = pair.a_memory.reshape(-1, 1024), pair.b_memory.reshape(-1, 1024)
    assert (rows[0][:, :512] == rows[1][:, :512]).all()
    assert not rows[0][:, 512:].any()


def test_a_released_transfer_and_a_destroyed_agent_refuse(pair: Pair) -> None:
    transfer = pair.transfer()
    transfer.release()
    transfer.release()
    with pytest.raises(NixlError, match="released"):
        transfer.post()
    other = pair.transfer()
    pair.a.destroy()
    pair.a.destroy()
    assert pair.a.destroyed
    for call in (pair.a.metadata, other.post, other.done, pair.transfer):
        with pytest.raises(NixlError, match="'a' is destroyed"):
            call()
    other.release()


def test_addresses_outside_of_regions_and_unknown_peers_are_refused(pair: Pair) -> None:
    with pytest.raises(NixlError, match="outside of the registered regions"):
        pair.transfer(offset=SIZE)
    with pytest.raises(NixlError, match="with 'nobody' failed"):
        pair.a.transfer("read", q(pair.a_address), q(pair.b_address), q(1), "nobody")
    with pytest.raises(ValueError, match="2 lengths"):
        pair.a.transfer("read", q(1), q(1), q(1, 2), "b")
    with pytest.raises(ValueError, match="'move'"):
        pair.a.transfer("move", q(1), q(1), q(1), "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 addresses and 2 lengths"):
        pair.a.register(q(1), q(1, 2))
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        pair.a.register(array("i", [1]), array("i", [1]))


@pytest.mark.parametrize("metadata", [b"", b"garbage", b"\0" * 300])
def test_damaged_metadata_is_refused(pair: Pair, metadata: bytes) -> None:
    with pytest.raises(NixlError, match=f"metadata of {len(metadata)} bytes"):
        pair.a.load_remote(metadata)


def test_a_peer_that_is_gone_is_an_error(pair: Pair) -> None:
    transfer = pair.transfer()
    pair.b.destroy()

    def fails() -> bool:
        try:
            transfer.post()
            transfer.done()
        except PeerLost as error:
            assert "the other side" in str(error)  # noqa: PT017
            return True
        return False

    wait_for(fails)


def test_registrations_and_peers_can_be_dropped(pair: Pair) -> None:
    before = len(pair.a.metadata())
    memory = np.zeros(4096, np.uint8)
    number = pair.a.register(q(memory.ctypes.data), q(4096))
    assert len(pair.a.metadata()) > before
    pair.a.deregister(number)
    pair.a.deregister(number)
    assert len(pair.a.metadata()) == before
    assert pair.a.forget_remote("b")
    assert not pair.a.forget_remote("b")


def test_an_agent_is_valid_or_does_not_exist() -> None:
    with pytest.raises(NixlMissing, match="no usable plugin 'NOSUCH'"):
        NixlAgent("x", backend="NOSUCH")
    with ucx_settings("posix,self"), pytest.raises(NixlMissing, match="'UCX' does not start"):
        NixlAgent("x")
    with ucx_settings("tcp") as told, pytest.raises(NixlMissing, match="does not start"):
        NixlAgent("x", backend_params={**told, "ucx_error_handling_mode": "nonsense"})
    assert live_agents() == 0
    with pytest.raises(TypeError):
        Transfer()  # type: ignore[call-arg]


def test_a_dropped_agent_frees_itself_and_a_transfer_keeps_it() -> None:
    pair = Pair()
    transfer = pair.transfer()
    pair.b.destroy()
    del pair
    assert live_agents() == 1
    assert live_transfers() == 1
    del transfer
    assert live_agents() == 0
    assert live_transfers() == 0


def test_threads_may_use_it_while_it_is_destroyed(pair: Pair) -> None:
    started = threading.Barrier(5)
    ends: list[str] = []

    def work() -> None:
        started.wait()
        try:
            while True:
                transfer = pair.transfer(length=4096)
                transfer.post()
                transfer.done()
        except PeerLost as error:
            ends.append(f"unexpected {error}")
        except NixlError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    for _ in range(20):
        pair.a.metadata()
    pair.a.destroy()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 4
    assert all("is destroyed" in end for end in ends), ends


def test_without_a_progress_thread_nothing_moves_but_in_progressing() -> None:
    with ucx_settings("tcp,self") as told:
        a, b = (NixlAgent(name, backend_params=told, progress_thread=False) for name in "ab")
    try:
        memory = np.zeros(2 * SIZE, np.uint8)
        memory[:SIZE] = 7
        address = memory.ctypes.data
        for agent in (a, b):
            agent.register(q(address), q(2 * SIZE))
        assert a.load_remote(b.metadata()) == "b"
        transfer = a.transfer("write", q(address), q(address + SIZE), q(SIZE), "b")
        assert not transfer.post()
        assert not any(transfer.done() for _ in range(1000))  # b does not even accept the connection
        for _ in range(2):
            threads = [threading.Thread(target=agent.keep_progressing, args=(Mailbox(),)) for agent in (a, b)]
            for thread in threads:
                thread.start()
            wait_for(transfer.done)
            for agent, thread in zip((a, b), threads, strict=True):
                agent.stop_progressing()
                thread.join(60)
                assert not thread.is_alive()
                agent.stop_progressing(False)  # once more
        assert (memory == 7).all()
    finally:
        a.destroy()
        b.destroy()
    with pytest.raises(NixlError, match="is destroyed"):
        a.keep_progressing(Mailbox())


def test_a_peer_is_told_the_number_of_what_has_arrived() -> None:
    with (
        AgentSession("a", tls="tcp,self", progress_thread=False) as a,
        AgentSession("b", tls="tcp,self", progress_thread=False) as b,
    ):
        memory = np.zeros(2 * SIZE, np.uint8)
        memory[:SIZE] = 7
        here, there = q(memory.ctypes.data), q(memory.ctypes.data + SIZE)
        for session in (a, b):
            session._agent.register(here, q(2 * SIZE))
        peer = a.connect(b.metadata())
        assert a.notifies
        moves = [Move(number, here, there, q(SIZE)) for number in (3, 2**32 - 1, 5)]
        with b.progressing():
            assert sorted(a.run("write", moves[:2], peer, in_flight_limit=2, notify=True)) == [3, 2**32 - 1]
            told: list[int] = []
            wait_for(lambda: told.extend(b.mailbox.take(60)) or len(told) == 2)
            assert sorted(told) == [3, 2**32 - 1]
            assert (memory == 7).all()
            assert list(a.run("write", moves[2:], peer, in_flight_limit=1)) == [5]
        assert b.mailbox.take(0) == []  # it was not to be told of that
        assert a.mailbox.take(0) == []


def test_some_of_many_are_waited_for(pair: Pair) -> None:
    started, waiting = pair.transfer("write"), pair.transfer("write", SIZE // 2, SIZE // 2)
    started.post()
    done: list[int] = []
    wait_for(lambda: done.extend(pair.a.wait_any([started], 60)) or done)
    assert done == [0]
    waiting.post()
    wait_for(waiting.done)
    assert pair.a.wait_any([started, waiting], 0) == [0, 1]
    assert pair.a.wait_any([], 0) == []
    waiting.release()
    with pytest.raises(NixlError, match="was released"):
        pair.a.wait_any([started, waiting], 0)
    with pytest.raises(TypeError):
        pair.a.wait_any([None], 0)  # type: ignore[list-item]
    pair.a.destroy()
    with pytest.raises(NixlError, match="is destroyed"):
        pair.a.wait_any([started], 0)


def test_destroying_an_agent_ends_its_progress() -> None:
    with ucx_settings("tcp,self"):
        agent = NixlAgent("a", progress_thread=False)
    thread = threading.Thread(target=agent.keep_progressing, args=(Mailbox(),))
    thread.start()
    agent.metadata()
    agent.destroy()
    thread.join(60)
    assert not thread.is_alive()


def test_progress_is_shared_by_those_who_need_it() -> None:
    with AgentSession("shared", tls="tcp,self", progress_thread=False) as session:

        def running() -> bool:
            return any(thread.name == "mx-progress" for thread in threading.enumerate())

        for _ in range(2):
            with session.progressing():
                with session.progressing():
                    assert running()
                assert running()
            assert not running()
        with session.progressing():
            session.fence()  # also while somebody needs it
    with AgentSession("threaded", tls="tcp,self") as session, session.progressing():
        assert not running()


def test_an_idle_agent_costs_next_to_nothing(start_worker: StartWorker) -> None:
    holder = start_worker("tcp", seed=1)
    holder.serve()
    before = holder.ask(do="cpu")

    def after_three_seconds() -> dict[str, float] | None:
        now = holder.ask(do="cpu")
        return now if now["wall_seconds"] - before["wall_seconds"] >= 3 else None

    # Asked for seldom, so that the questions cost nothing: counted is the process' CPU time, not how long it takes.
    pause = threading.Event()
    after = None
    while after is None:
        pause.wait(1.5)
        after = after_three_seconds()
    busy = (after["process_seconds"] - before["process_seconds"]) / (after["wall_seconds"] - before["wall_seconds"])
    assert busy <= 0.03, f"an idle worker uses {busy:.1%} of a core"
