"""Several servers over one cache folder, and servers that are killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from mxbench.stand_ins.hub import Fault, HubStandIn
from mxserver.wire import WireError
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2, model_pb2_grpc
from tests.models.conftest import (
    FILE_DIGESTS,
    FILES,
    REPOSITORY,
    StartServer,
    digest_of,
    digests_of,
    files_below,
    pattern,
)
from tests.server.redis_process import shared_redis

LARGE = "model-00001-of-00002.safetensors"


class Ensure(threading.Thread):
    """A caller who waits for a download, in a thread of its own."""

    def __init__(self, address: str, *, patience_seconds: float = 30, revision: str | None = None) -> None:
        super().__init__()
        self._address = address
        self._patience_seconds = patience_seconds
        self._revision = revision
        self.messages: list[str] = []
        self.told = threading.Condition()
        self.commit: str | None = None
        self.error: WireError | None = None
        self.start()

    def run(self) -> None:
        with ModelClient(self._address, patience_seconds=self._patience_seconds) as client:
            try:
                self.commit = client.ensure(REPOSITORY, revision=self._revision, on_update=self._note)
            except WireError as error:
                self.error = error

    def _note(self, update: object) -> None:
        with self.told:
            self.messages.append(update.message)  # type: ignore[attr-defined]
            self.told.notify_all()

    def wait_for_message(self, text: str) -> None:
        with self.told:
            assert self.told.wait_for(lambda: any(text in message for message in self.messages), 30), self.messages

    def result(self) -> str:
        self.join(60)
        assert not self.is_alive()
        assert self.error is None, self.error
        assert self.commit
        return self.commit


def held_back(hub: HubStandIn, path: str = LARGE, after: int = 1_000_000) -> threading.Event:
    gate = threading.Event()
    hub.faults[f"GET {path}"].append(Fault(gate=gate, gate_after=after))
    return gate


def all_but_that_are_complete(cache: Path) -> None:
    """Waits: files come side by side, and the one that is held back is at its gate before the small ones are kept."""
    staging = cache / ".modelexpress" / "staging"
    until(lambda: sum(path.is_file() and path.name.count(".") == 3 for path in staging.glob("*/*")) == len(FILES) - 1)


def nothing_half_written(cache: Path) -> bool:
    """Every file that has its name has its bytes."""
    names = (cache / "models--org--tiny-1.0").glob("snapshots/*/**/*")
    return all(path.read_bytes() in FILES.values() for path in names if path.is_file())


def test_callers_of_one_server_share_a_download(start_server: StartServer, hub: HubStandIn) -> None:
    gate = held_back(hub)
    address = start_server().address
    callers = [Ensure(address) for _ in range(8)]
    hub.wait_at_gate()
    for caller in callers:
        caller.wait_for_message("downloading")
    gate.set()
    assert len({caller.result() for caller in callers}) == 1
    assert hub.requests[f"GET {LARGE}"] == 1
    assert hub.requests["api"] == 1


def test_main_and_its_commit_are_one_download(start_server: StartServer, hub: HubStandIn) -> None:
    gate = held_back(hub)
    address = start_server().address
    by_name = Ensure(address)
    hub.wait_at_gate()
    by_commit = Ensure(address, revision=hub.repositories[REPOSITORY].refs["main"])
    by_commit.wait_for_message("another")
    gate.set()
    assert by_name.result() == by_commit.result()
    assert hub.requests[f"GET {LARGE}"] == 1


def test_caller_that_leaves_does_not_stop_the_download(start_server: StartServer, hub: HubStandIn) -> None:
    gate = held_back(hub)
    process = start_server()
    client = ModelClient(process.address, patience_seconds=0)

    def ensure() -> None:
        with pytest.raises(WireError):
            client.ensure(REPOSITORY)

    caller = threading.Thread(target=ensure)
    caller.start()
    hub.wait_at_gate()
    client.close()
    caller.join()
    process.wait_for("a caller left")
    gate.set()
    process.wait_for("downloaded model=")
    with ModelClient(process.address) as other:
        other.ensure(REPOSITORY)
        assert len(other.list_files(REPOSITORY).files) == len(FILES)
    assert hub.requests[f"GET {LARGE}"] == 1


def test_replicas_download_once(start_server: StartServer, hub: HubStandIn, cache_folder: Path) -> None:
    gate = held_back(hub)
    first = Ensure(start_server().address)
    hub.wait_at_gate()
    second = Ensure(start_server().address)
    second.wait_for_message("another replica")
    assert nothing_half_written(cache_folder)
    gate.set()
    commit = first.result()
    assert second.result() == commit
    assert hub.requests[f"GET {LARGE}"] == 1
    assert files_below(cache_folder / "models--org--tiny-1.0" / "snapshots" / commit) == FILE_DIGESTS


def test_replica_takes_over_from_one_that_was_killed(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    held_back(hub)
    victim = start_server()
    first = Ensure(victim.address, patience_seconds=0)
    hub.wait_at_gate()
    second = Ensure(start_server(MX_CACHE_LEASE_SECS="600").address)
    second.wait_for_message("another replica")
    all_but_that_are_complete(cache_folder)
    victim.process.kill()
    first.join()
    assert first.error is not None
    commit = second.result()  # at once: the lease's lock ended with the process
    assert hub.requests[f"GET {LARGE}"] == 2
    assert hub.requests["GET config.json"] == 1  # what was complete is not fetched again
    assert files_below(cache_folder / "models--org--tiny-1.0" / "snapshots" / commit) == FILE_DIGESTS


def test_replica_that_was_stopped_too_long_publishes_nothing(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path, tmp_path: Path
) -> None:
    """Of replicas on two machines, whose locks of files do not meet, over one Redis."""
    gate = held_back(hub)
    (tmp_path / "flock.c").write_text("int flock(int handle, int operation) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "flock.so", "flock.c"], cwd=tmp_path, check=True)
    elsewhere = {
        "MX_METADATA_BACKEND": "redis",
        "REDIS_URL": shared_redis().url,
        "LD_PRELOAD": str(tmp_path / "flock.so"),
    }
    stopped = start_server(**elsewhere)
    first = Ensure(stopped.address)
    hub.wait_at_gate()
    os.kill(stopped.process.pid, signal.SIGSTOP)
    second = Ensure(start_server(**elsewhere).address)
    commit = second.result()
    record = next((cache_folder / ".modelexpress" / "records").iterdir())
    written = record.stat().st_ino
    gate.set()
    os.kill(stopped.process.pid, signal.SIGCONT)
    stopped.wait_for("download was taken over")
    assert first.result() == commit
    assert record.stat().st_ino == written
    assert files_below(cache_folder / "models--org--tiny-1.0" / "snapshots" / commit) == FILE_DIGESTS


def test_server_that_is_told_to_stop_keeps_what_is_complete(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    held_back(hub)
    process = start_server("--drain", "600")
    caller = Ensure(process.address, patience_seconds=0)
    hub.wait_at_gate()
    all_but_that_are_complete(cache_folder)
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(timeout=120) == 0
    caller.join()
    assert caller.error is not None
    assert Ensure(start_server().address).result()
    assert hub.requests["GET config.json"] == 1
    assert nothing_half_written(cache_folder)


def test_sigterm_while_another_replica_downloads(start_server: StartServer, hub: HubStandIn) -> None:
    gate = held_back(hub)
    first = Ensure(start_server().address)
    hub.wait_at_gate()
    waiting = start_server("--drain", "1")
    second = Ensure(waiting.address, patience_seconds=0)
    second.wait_for_message("another replica")
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.process.wait(timeout=120) == 0
    second.join()
    assert second.error is not None
    gate.set()
    assert first.result()


def test_sigterm_while_the_hub_does_not_answer(start_server: StartServer, hub: HubStandIn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start_server("--drain", "1", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
        caller = Ensure(process.address, patience_seconds=0)
        asked, _ = silent.accept()
        with asked:
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(timeout=120) == 0
        caller.join()
    assert caller.error is not None
    assert not any("Traceback" in line for line in process.lines)


def test_sigterm_while_a_stream_is_not_taken(start_server: StartServer, hub: HubStandIn) -> None:
    hub.add("org/long", {"model.safetensors": pattern(40_000_000, 30)})
    process = start_server("--drain", "1")
    with ModelClient(process.address) as client, grpc.insecure_channel(process.address) as channel:
        client.ensure("org/long")
        request = model_pb2.ModelFilesRequest(model_name="org/long")
        stream = model_pb2_grpc.ModelServiceStub(channel).StreamModelFiles(request)
        assert next(stream)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(timeout=120) == 0
    assert not any("Traceback" in line for line in process.lines)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


KILL_SEEDS = int(os.environ.get("TEST_KILL_SEEDS", "5"))  # of two kills each; more by this name


@pytest.mark.parametrize("seed", range(KILL_SEEDS))
def test_kills_at_random_moments(start_server: StartServer, hub: HubStandIn, cache_folder: Path, seed: int) -> None:
    """Whatever the moment: nothing half-written is visible, and the next server brings the download to its end."""
    files = {f"part-{number}.safetensors": pattern(600_000, 10 + number) for number in range(8)} | FILES
    commit = hub.add(REPOSITORY, files)
    total = sum(map(len, files.values()))
    chance = random.Random(seed)
    for _ in range(2):
        process = start_server()
        before = hub.bytes_sent.total()
        enough = before + chance.randrange(total)
        caller = Ensure(process.address, patience_seconds=0)
        until(lambda enough=enough, caller=caller: hub.bytes_sent.total() >= enough or not caller.is_alive())
        process.process.kill()
        caller.join()
        names = (cache_folder / "models--org--tiny-1.0").glob("snapshots/*/**/*")
        assert {digest_of(path.read_bytes()) for path in names if path.is_file()} <= set(digests_of(files).values())
    with ModelClient(start_server().address, patience_seconds=0) as client:
        assert client.ensure(REPOSITORY) == commit
        assert not [verdict for verdict in client.validate(REPOSITORY) if verdict.problem]
    assert files_below(cache_folder / "models--org--tiny-1.0" / "snapshots" / commit) == digests_of(files)
    assert not list((cache_folder / ".modelexpress" / "staging").iterdir())


def test_client_rides_out_a_restart(start_server: StartServer, hub: HubStandIn) -> None:
    held_back(hub)
    process = start_server()
    port = str(process.port)
    caller = Ensure(process.address)
    hub.wait_at_gate()
    process.process.kill()
    process.process.wait()
    start_server("--port", port, "--metrics-port", "0", "--files-port", "0")
    assert caller.result()
