"""`mx bench drain`: SIGTERM of a server under load; every call is counted.

Callers send one call after the other over connections that stay open. Each round ends with SIGTERM while all of them
are at work. A call may be answered or refused cleanly: by the server, because it drains, or by the system, because
the port is closed. Anything else (cancelled, cut, without an answer) is a failed call.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import grpc

from mxbench.control.processes import Server
from mxbench.results import document, json_option, rounds_option
from mxserver.wire.calls import channel_options
from mxserver.wire.proto import p2p_pb2, p2p_pb2_grpc

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="bench/drain")
READY = p2p_pb2.SOURCE_STATUS_READY
CALL_SECONDS = 60.0
CLEAN = ("the server is draining", "Connection refused")


@click.command("drain")
@click.option("--calls", type=click.IntRange(1), default=12_000, show_default=True, help="Calls in all, at least.")
@rounds_option(6, "How often the server gets SIGTERM.")
@click.option(
    "--callers", type=click.IntRange(1), default=24, show_default=True, help="Connections that call at the same time."
)
@json_option
def command(calls: int, rounds: int, callers: int, as_json: bool) -> None:
    """SIGTERM under load: which calls fail."""
    outcomes: Counter[str] = Counter()
    codes: list[int] = []
    longest = 0.0
    place = Path(tempfile.mkdtemp(prefix="mx-drain-"))
    try:
        for number in range(rounds):
            code, seconds = _round(place, number, -(-calls // rounds), callers, outcomes)
            codes.append(code)
            longest = max(longest, seconds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    answered, refused = outcomes.pop("answered", 0), outcomes.pop("refused", 0)
    figures = {
        "calls": answered + refused + outcomes.total(),
        "answered_calls": answered,
        "refused_calls": refused,
        "failed_calls": outcomes.total(),
        "exits_not_0": sum(code != 0 for code in codes),
        "longest_drain_seconds": round(longest, 3),
    }
    if as_json:
        asked = {"calls": calls, "rounds": rounds, "callers": callers}
        told = document("drain", figures, settings=asked, rounds=rounds, failures=dict(outcomes))
        click.echo(json.dumps(told))
    else:
        for name, value in figures.items():
            click.echo(f"{name:28} {value:g}")
        for reason, count in outcomes.items():
            click.echo(f"  {count} times: {reason}")
    if figures["failed_calls"] or figures["exits_not_0"]:
        sys.exit(1)


def _round(place: Path, number: int, calls: int, callers: int, outcomes: Counter[str]) -> tuple[int, float]:
    """Runs calls, sends SIGTERM, waits until all callers are refused; returns exit code and seconds."""
    server = Server(place, number, ["--store-path", str(place / "state.sqlite3"), "--drain", "30"], 0)
    counting, enough = threading.Lock(), threading.Event()
    answered = 0

    def note(outcome: str) -> None:
        nonlocal answered
        with counting:
            outcomes[outcome] += 1
            answered += outcome == "answered"
            if answered >= calls:
                enough.set()

    threads = [threading.Thread(target=_call, args=(server.address, n, note)) for n in range(callers)]
    for thread in threads:
        thread.start()
    while not enough.wait(0.1):
        if not any(thread.is_alive() for thread in threads):
            break
    began = time.monotonic()
    server.process.terminate()
    code = server.process.wait(CALL_SECONDS)
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join()
    return code, seconds


def _call(address: str, number: int, note: Callable[[str], None]) -> None:
    """Publishes, gets, lists and updates in turn until it is refused."""
    name = f"w{number}"
    worker = p2p_pb2.WorkerMetadata(status=READY, nixl_metadata=bytes(512))
    publish = p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=worker, worker_id=name)
    options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub = p2p_pb2_grpc.P2pServiceStub(channel)
        source = ""
        turn = 0
        while True:
            try:
                if turn % 10 == 0:
                    source = stub.PublishMetadata(publish, timeout=CALL_SECONDS).mx_source_id
                elif turn % 10 == 5:
                    stub.ListSources(p2p_pb2.ListSourcesRequest(identity=IDENTITY), timeout=CALL_SECONDS)
                elif turn % 2:
                    request = p2p_pb2.GetMetadataRequest(mx_source_id=source, worker_id=name)
                    stub.GetMetadata(request, timeout=CALL_SECONDS)
                else:
                    update = p2p_pb2.UpdateStatusRequest(mx_source_id=source, worker_id=name, status=READY)
                    stub.UpdateStatus(update, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                details = error.details() or ""
                clean = error.code() is grpc.StatusCode.UNAVAILABLE and any(text in details for text in CLEAN)
                note("refused" if clean else f"{error.code().name}: {details}")
                return
            note("answered")
            turn += 1


if __name__ == "__main__":
    sys.exit(command())
