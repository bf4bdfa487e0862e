"""The command, as a process of its own: help, refusals, signals, kills."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mxserver.wire import ServerUnreachable, StaleEpoch
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2
from tests.server.conftest import ROOT, ServerProcess
from tests.server.stores import READY, STALE

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="m")
SOURCE = source_id(IDENTITY)
WORKER = p2p_pb2.WorkerMetadata(nixl_metadata=b"agent")
Start = Callable[..., ServerProcess]


def mxserver(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mxserver", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environ},
        cwd=ROOT,
    )


def test_help_explains_and_ends_with_examples() -> None:
    run = mxserver("--help")
    assert run.returncode == 0
    assert run.stderr == ""
    assert "which other workers have the weights" in run.stdout
    for flag in ("--host", "--port", "--store", "--store-path", "--log-level", "--drain"):
        assert flag in run.stdout
    assert "MODEL_EXPRESS_SERVER_PORT; default 8001" in re.sub(r"\s+", " ", run.stdout)
    assert "\n  mxserver\n" in run.stdout.replace("\n    ", "\n  ")
    assert "\n  mxserver --port 9001 --store-path" in run.stdout.replace("\n    ", "\n  ")


def test_help_imports_nothing_heavy() -> None:
    program = "import sys, mxserver.cli; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = set(run.stdout.split())
    assert not modules & {"grpc", "google.protobuf", "pydantic", "pydantic_settings", "sqlite3", "torch"}


def test_version() -> None:
    assert re.fullmatch(r"mxserver, version \d+\.\d+\.\d+\n", mxserver("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--port", "eighty"], {}, "--port 'eighty'"),
        ([], {"MODEL_EXPRESS_SERVER_PORT": "eighty"}, "MODEL_EXPRESS_SERVER_PORT='eighty'"),
        ([], {"MX_METADATA_BACKEND": "etcd"}, "MX_METADATA_BACKEND='etcd'"),
        (["--drain", "soon"], {}, "--drain 'soon'"),
    ],
)
def test_bad_setting_ends_with_2_and_one_line(arguments: list[str], environ: dict[str, str], named: str) -> None:
    run = mxserver(*arguments, **environ)
    assert run.returncode == 2
    assert re.fullmatch(rf"mxserver: {re.escape(named)} is refused: it must be .*; .* \[MX_SETTING\]\n", run.stderr)


def test_unusable_store_ends_with_1_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"x" * 5000)
    run = mxserver("--port", "0", "--store-path", str(path))
    assert run.returncode == 1
    assert run.stderr == (
        f"mxserver: {path} is damaged (file is not a database); move it away to start empty, or give another "
        "--store-path [MX_STORE_UNUSABLE]\n"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_port_in_use_ends_with_1_and_one_line_and_touches_no_store(tmp_path: Path, host: str) -> None:
    path = tmp_path / "state.sqlite3"
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        run = mxserver("--host", host, "--port", str(port), "--store-path", str(path))
    assert run.returncode == 1
    assert run.stderr == (
        f"mxserver: cannot listen on {host}:{port} (Address already in use); stop what listens there, or choose with "
        "--host and --port (port 0 takes a free one) [MX_PORT_UNAVAILABLE]\n"
    )
    assert not path.exists()


def test_host_of_another_machine_is_refused() -> None:
    run = mxserver("--host", "192.0.2.1", "--port", "0", "--store", "memory")
    assert run.returncode == 1
    assert "cannot listen on 192.0.2.1:0 (Cannot assign requested address)" in run.stderr


def test_misspelt_names_and_names_without_effect_are_warned_about(start_server: Start) -> None:
    server = start_server(MX_STORE_PAHT="/x", MX_SERVER_PORT="tcp://10.0.0.7:8001")
    warnings = [line.split(" mxserver ", 1)[1] for line in server.lines if " WARNING " in line]
    assert warnings == ["MX_STORE_PAHT is no setting; the nearest one is MX_STORE_PATH"]


def test_ipv6_address_is_listened_on_and_shown(start_server: Start) -> None:
    if not socket.has_ipv6 or not _has_ipv6_loopback():
        pytest.skip("this machine has no IPv6 loopback address")
    server = start_server("--host", "::1", "--store", "memory")
    assert any(f"listening on [::1]:{server.port} " in line for line in server.lines)
    with ServerClient(f"[::1]:{server.port}") as client:
        assert client.health().status == "ok"


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_more_workers_than_the_usual_limit_of_files_may_connect(start_server: Start) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))  # what the server inherits
    try:
        server = start_server("--store", "memory")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 1_048_576) if hard != resource.RLIM_INFINITY else soft == 1_048_576


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("store", ["sqlite", "memory"])
def test_signal_without_calls_ends_with_0(start_server: Start, number: signal.Signals, store: str) -> None:
    server = start_server("--store", store)
    server.signal(number)
    assert server.wait() == 0
    assert f"draining signal={number.name} " in server.lines[-2]
    assert server.lines[-1].endswith(" INFO mxserver stopped")


STOPPED_AT_ITS_START = """
import os, signal
from mxserver import periodic
from mxserver.cli import main
start = periodic.Periodic.start
def start_and_stop(self):  # the first thing that a server does when it answers calls
    os.kill(os.getpid(), signal.SIGTERM)
    start(self)
periodic.Periodic.start = start_and_stop
main(["--host=127.0.0.1", "--port=0", "--metrics-port=0", "--files-port=0", "--store=memory"])
"""


def test_signal_in_the_moment_when_calls_are_answered_drains() -> None:
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_ITS_START], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "draining signal=SIGTERM" in run.stderr


def test_sigterm_under_load_fails_no_running_call_and_keeps_all_answers(start_server: Start) -> None:
    """Each thread publishes until it is refused; whatever was answered is there after a restart."""
    server = start_server()
    answered: list[tuple[str, int]] = []
    refusals: list[Exception] = []
    enough = threading.Event()

    def publish(thread: int) -> None:
        with ServerClient(server.address) as client:
            for n in range(100_000):
                try:
                    answered.append((f"{thread}-{n}", client.publish(IDENTITY, WORKER, f"{thread}-{n}").epoch))
                except ServerUnreachable as error:
                    refusals.append(error)
                    return
                if len(answered) > 100:
                    enough.set()

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    assert enough.wait(60)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    for thread in threads:
        thread.join()
    assert {re.search(r"failed with \w+", str(refusal))[0] for refusal in refusals} == {"failed with UNAVAILABLE"}, (
        refusals
    )
    assert len(refusals) == 8
    with ServerClient(start_server().address) as client:
        found = {reference.worker_id for reference in client.list_sources(IDENTITY)}
    # A call that was refused left nothing behind either: it never ran.
    assert found == {worker for worker, _ in answered}


def test_second_signal_ends_at_once_with_its_number(start_server: Start) -> None:
    """A call is held up by sending only the first half of its request's body; the first signal waits for it."""
    server = start_server("--drain", "600")
    with socket.create_connection(("127.0.0.1", server.port)) as half_call:
        half_call.sendall(half_of_a_call())
        with ServerClient(server.address) as client:
            client.health()
        server.signal(signal.SIGTERM)
        server.wait_for("draining signal=SIGTERM seconds=600")
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT
    assert any("cut signal=SIGINT" in line for line in server.lines)


def test_drain_is_bounded(start_server: Start) -> None:
    server = start_server("--drain", "0.2")
    with socket.create_connection(("127.0.0.1", server.port)) as half_call:
        half_call.sendall(half_of_a_call())
        with ServerClient(server.address) as client:
            client.health()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def half_of_a_call(method: str = "/model_express.p2p.P2pService/PublishMetadata") -> bytes:
    """HTTP/2 by hand (RFC 9113, 7541): preface, empty SETTINGS, and the headers of a call whose body never comes."""

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(
        literal(name, value)
        for name, value in [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method.encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
    )
    settings_frame = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    headers_frame = len(headers).to_bytes(3, "big") + b"\x01\x04\x00\x00\x00\x01" + headers
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings_frame + headers_frame


def test_sigkill_and_restart_lose_nothing_answered_and_no_live_source(start_server: Start) -> None:
    server = start_server()
    epochs: dict[str, int] = {}
    with ServerClient(server.address) as client:
        for n in range(20):
            epochs[f"w{n}"] = client.publish(IDENTITY, WORKER, f"w{n}").epoch
            client.update_status(SOURCE, f"w{n}", 0, READY, epoch=epochs[f"w{n}"])
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    server = start_server()
    with ServerClient(server.address) as client:
        assert {reference.worker_id for reference in client.list_sources(IDENTITY, status=READY)} == set(epochs)
        for worker, epoch in epochs.items():
            client.update_status(SOURCE, worker, 0, READY, epoch=epoch)
        newer = client.publish(IDENTITY, WORKER, "w0").epoch
        assert newer > max(epochs.values())
        with pytest.raises(StaleEpoch):
            client.update_status(SOURCE, "w0", 0, READY, epoch=epochs["w0"])


def test_client_finds_the_server_again_after_a_restart(start_server: Start) -> None:
    server = start_server()
    with ServerClient(server.address) as client:
        client.publish(IDENTITY, WORKER, "w")
        server.signal(signal.SIGKILL)
        server.wait()
        with pytest.raises(ServerUnreachable):
            client.health()
        start_server("--port", str(server.port), "--metrics-port", "0", "--files-port", "0")
        _until(lambda: _answers(client))
        assert [reference.worker_id for reference in client.list_sources()] == ["w"]


def test_worker_that_goes_silent_becomes_stale_and_then_gone(start_server: Start) -> None:
    server = start_server("--heartbeat-timeout", "0.2", "--gc-timeout", "0.2")
    with ServerClient(server.address) as client:
        assert client.publish(IDENTITY, WORKER, "w").lease_ms == 200
        _until(lambda: client.get_metadata(SOURCE, "w") is None)
    server.wait_for("swept stale=1 deleted=0|swept stale=0 deleted=1")


def test_server_that_was_stopped_does_not_blame_the_workers(start_server: Start) -> None:
    """SIGSTOP for longer than the lease: nobody could be heard, so nobody is declared dead."""
    server = start_server("--heartbeat-timeout", "2")
    with ServerClient(server.address) as client:
        client.publish(IDENTITY, WORKER, "w")
        client.update_status(SOURCE, "w", 0, READY)
        server.signal(signal.SIGSTOP)
        threading.Event().wait(2.5)  # the time itself is what is tested here
        server.signal(signal.SIGCONT)
        server.wait_for("was stopped seconds=")
        record = client.get_metadata(SOURCE, "w")
        assert record is not None
        assert record.worker.status == READY
        _until(lambda: (found := client.get_metadata(SOURCE, "w")) is not None and found.worker.status == STALE)


def _answers(client: ServerClient) -> bool:
    try:
        client.health()
    except ServerUnreachable:
        return False
    return True


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("the condition did not come true within two minutes")
