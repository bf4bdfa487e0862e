"""`mx bench kills` and `mx bench drain`, small: nothing acknowledged is lost, no call fails, and they would tell."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from mxbench.control import drain as bench_drain
from mxbench.control.kills import IDENTITY, READY, missing
from mxcore.cli.main import mx
from mxserver.server import Server
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2


@pytest.mark.parametrize(
    ("store", "victim", "kills"), [("sqlite", "server", 4), ("redis", "server", 3), ("redis", "store", 4)]
)
def test_kills_lose_nothing(store: str, victim: str, kills: int) -> None:
    arguments = ["bench", "kills", "--kills", str(kills), "--store", store, "--victim", victim, "--threads", "3"]
    run = CliRunner().invoke(mx, [*arguments, "--json"])
    assert run.exit_code == 0, run.output
    figures = json.loads(run.stdout)["figures"]
    assert figures["kills"] >= kills
    assert figures["acknowledged_publishes"] >= figures["records"] > 0
    assert [figures[name] for name in ("lost_records", "dropped_sources", "refused_calls")] == [0, 0, 0]


def test_sqlite_cannot_be_killed_apart_from_its_server() -> None:
    run = CliRunner().invoke(mx, ["bench", "kills", "--victim", "store"])
    assert (run.exit_code, "--store redis" in run.output) == (2, True)


def test_what_is_lost_older_or_not_ready_is_found(server: Server, client: ServerClient) -> None:
    worker = p2p_pb2.WorkerMetadata(status=READY)
    answers = {name: client.publish(IDENTITY, worker, name) for name in ("fine", "older", "stale")}
    source = answers["fine"].mx_source_id
    client.update_status(source, "stale", 0, p2p_pb2.SOURCE_STATUS_STALE)
    acknowledged = {name: answer.epoch for name, answer in answers.items()} | {"gone": 1}
    acknowledged["older"] += 100
    assert missing(client, acknowledged, source) == ({"gone", "older"}, {"gone", "stale"})


def test_sigterm_fails_no_call() -> None:
    run = CliRunner().invoke(mx, ["bench", "drain", "--calls", "1200", "--rounds", "2", "--callers", "8", "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    figures = result["figures"]
    assert figures["answered_calls"] >= 1200
    assert figures["refused_calls"] == 2 * 8
    assert (figures["failed_calls"], figures["exits_not_0"], result["failures"]) == (0, 0, {})
    assert figures["calls"] == figures["answered_calls"] + figures["refused_calls"]


@pytest.mark.parametrize(
    ("code", "details", "outcome"),
    [
        ("UNAVAILABLE", "the server is draining; try again", "refused"),
        ("UNAVAILABLE", "Socket closed", "UNAVAILABLE: Socket closed"),
        ("CANCELLED", "the server is draining", "CANCELLED: the server is draining"),
    ],
)
def test_drain_tells_a_clean_refusal_from_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, details: str, outcome: str
) -> None:
    class Failure(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode[code]

        def details(self) -> str:
            return details

    def fail(*_: object, **__: object) -> None:
        raise Failure

    class Stub:
        def __init__(self, _: grpc.Channel) -> None:
            self.PublishMetadata = fail

    monkeypatch.setattr(bench_drain.p2p_pb2_grpc, "P2pServiceStub", Stub)
    noted: list[str] = []
    bench_drain._call("127.0.0.1:1", 0, noted.append)
    assert noted == [outcome]
