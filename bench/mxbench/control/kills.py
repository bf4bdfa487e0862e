"""`mx bench kills`: SIGKILL of the server, or of its Redis, at random moments while workers publish.

Threads publish records, and publish them again, as fast as they are answered; each remembers what was acknowledged. A
victim is killed at a random moment, in its start or later, and started again. After each kill every acknowledged
record must be there, READY, with an epoch no older than the acknowledged one.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mxbench.control.processes import Redis, Server
from mxbench.fleet.free_ports import free_port
from mxbench.results import document, json_option
from mxserver.wire import ServerUnreachable, WireError
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

READY = p2p_pb2.SOURCE_STATUS_READY
IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="bench/kills")
RECORDS_PER_THREAD = 20
BACK_SECONDS = 120.0


@click.command("kills")
@click.option("--kills", type=click.IntRange(1), default=60, show_default=True, help="How often.")
@click.option("--store", type=click.Choice(["sqlite", "redis"]), default="sqlite", show_default=True)
@click.option("--victim", type=click.Choice(["server", "store"]), default="server", show_default=True)
@click.option(
    "--threads", type=click.IntRange(1), default=6, show_default=True, help="Workers that publish at the same time."
)
@click.option(
    "--longest",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Seconds between a start and its kill, at most.",
)
@click.option("--seed", default=7, show_default=True, help="Of the random moments.")
@json_option
def command(kills: int, store: str, victim: str, threads: int, longest: float, seed: int, as_json: bool) -> None:
    """Kills the server, or its store, and looks for what was acknowledged."""
    if victim == "store" and store != "redis":
        raise click.UsageError("SQLite lives in the server: --victim store needs --store redis")
    place = Path(tempfile.mkdtemp(prefix="mx-kills-"))
    try:
        with ExitStack() as stack:
            figures = _run(stack, place, kills, store, victim, threads, longest, random.Random(seed))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if as_json:
        asked = {"kills": kills, "threads": threads, "longest": longest, "seed": seed}
        click.echo(json.dumps(document("kills", figures, settings=asked, store=store, victim=victim)))
    else:
        for name, value in figures.items():
            click.echo(f"{name:28} {value:g}")
    if figures["lost_records"] or figures["dropped_sources"] or figures["refused_calls"]:
        sys.exit(1)


class Publishers:
    """Threads that publish, and what was acknowledged, by worker id."""

    def __init__(self, address: str, threads: int) -> None:
        self.acknowledged: dict[str, int] = {}
        self.calls = 0
        self.refusals: list[str] = []  # of workers that did nothing wrong
        self._address = address
        self._counting = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._publish, args=(number,)) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def _publish(self, number: int) -> None:
        worker = p2p_pb2.WorkerMetadata(status=READY, nixl_metadata=bytes(512))
        epochs: dict[str, int] = {}
        turn = 0
        with ServerClient(self._address, timeout_seconds=10) as client:
            while not self._stop.is_set():
                name = f"w{number}-{turn % RECORDS_PER_THREAD}"
                try:
                    epochs[name] = client.publish(IDENTITY, worker, name, epochs.get(name, 0)).epoch
                except ServerUnreachable:
                    self._stop.wait(0.01)  # as a worker does: again, with the epoch that it has
                    continue
                except WireError as error:
                    self.refusals.append(str(error))
                    return
                with self._counting:
                    self.acknowledged[name] = epochs[name]
                    self.calls += 1
                turn += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def missing(client: ServerClient, acknowledged: dict[str, int], source: str) -> tuple[set[str], set[str]]:
    """Counts acknowledged records that are lost or older, and sources that are not READY."""
    ready = {reference.worker_id for reference in client.list_sources(IDENTITY, status=READY)}
    lost = set()
    for name, epoch in acknowledged.items():
        found = client.get_metadata(source, name)
        if found is None or found.epoch < epoch:
            lost.add(name)
    return lost, acknowledged.keys() - ready


class Victims:
    """The server and Redis processes: kills one and starts it again."""

    def __init__(self, stack: ExitStack, place: Path, store: str, victim: str) -> None:
        self._place = place
        self._kills_store = victim == "store"
        self._port = free_port()
        self._arguments = ["--store", store, "--store-path", str(place / "state.sqlite3")]
        self._arguments += ["--port", str(self._port), "--metrics-port", "0", "--files-port", "0", "--drain", "1"]
        self._redis: Redis | None = None
        if store == "redis":
            self._redis = Redis(place, 0)
            self._arguments += ["--redis-url", self._redis.url]
        self._server: Server | None = None
        stack.callback(self._end)
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self, *, wait: bool = True) -> None:
        """Starts the processes that do not run; with `wait`, waits until the server listens."""
        if self._redis is not None and self._redis.process.poll() is not None:
            self._redis = Redis(self._place, 0)
        if self._server is None or self._server.process.poll() is not None:
            self._server = Server(self._place, 0, self._arguments, 0, wait=wait)

    def kill(self) -> None:
        victim = self._redis if self._kills_store else self._server
        assert victim is not None
        victim.process.kill()
        victim.process.wait()

    def _end(self) -> None:
        for one in (self._server, self._redis):
            if one is not None:
                one.process.kill()
                one.process.wait()


def _run(
    stack: ExitStack,
    place: Path,
    kills: int,
    store: str,
    victim: str,
    threads: int,
    longest: float,
    moments: random.Random,
) -> dict[str, float]:
    began = time.monotonic()
    victims = Victims(stack, place, store, victim)
    publishers = Publishers(victims.address, threads)
    stack.callback(publishers.stop)
    client = stack.enter_context(ServerClient(victims.address, timeout_seconds=10))
    lost: set[str] = set()
    dropped: set[str] = set()
    in_start = 0
    source = _answered(lambda: client.publish(IDENTITY, p2p_pb2.WorkerMetadata(), "first").mx_source_id)
    for number in range(kills):
        starting = number % 4 == 3 and victim == "server"
        if starting:  # a kill before it listens; the one before this one took the server away
            victims.kill()
            victims.start(wait=False)
            in_start += 1
        time.sleep(moments.uniform(0, longest))
        victims.kill()
        with publishers._counting:
            acknowledged = dict(publishers.acknowledged)
        victims.start()
        gone, stale = _answered(lambda known=acknowledged: missing(client, known, source))
        lost |= gone
        dropped |= stale
        if number % 20 == 19:
            click.echo(f"{number + 1} kills, {publishers.calls} publishes acknowledged", err=True)
    publishers.stop()
    return {
        "kills": kills + in_start,
        "kills_in_start": in_start,
        "acknowledged_publishes": publishers.calls,
        "records": len(publishers.acknowledged),
        "lost_records": len(lost),
        "dropped_sources": len(dropped),
        "refused_calls": len(publishers.refusals),
        "seconds": round(time.monotonic() - began, 1),
    }


def _answered(ask: Any) -> Any:
    """Repeats a call until the server and its store are back; returns its result."""
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        try:
            return ask()
        except ServerUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(command())
