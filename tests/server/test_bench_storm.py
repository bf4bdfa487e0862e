"""`mx bench storm`, small: nobody asks while it waits, one reads for each rank, and nothing fails."""

from __future__ import annotations

import json
import os
import time

import pytest
from click.testing import CliRunner

from mxbench.storm import core_shares, refusing, streams
from mxbench.storm.command import worse
from mxbench.storm.http2_stream import WatchReader
from mxcore.cli.main import mx
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire import ServerUnreachable
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2, watch_pb2

ARGUMENTS = ["--ranks", "11", "--whole", "3", "--ranks-per-host", "2", "--processes", "1", "--start-seconds", "0.2"]
ARGUMENTS += ["--read-seconds", "4", "--receive-seconds", "0.2", "--heartbeat-seconds", "1", "--store", "redis"]
ARGUMENTS += ["--megabytes", "2", "--no-refusing"]


def test_a_fleet_starts_over_two_replicas() -> None:
    run = CliRunner().invoke(mx, ["bench", "storm", *ARGUMENTS, "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    figures = result["figures"]
    assert result["runs"]["redis"]["errors"] == {}
    assert (figures["ranks"], figures["turns_given_twice"], figures["errors"]) == (11, 0, 0)
    assert (figures["whole_right"], figures["whole_from_peers"]) == (3, 2)
    assert figures["readers_of_storage"] >= 3
    assert figures["notices"] + figures["readers_of_storage"] == 8 + 1  # of the whole ones, one reads


def test_of_two_stores_the_worse_figure_counts() -> None:
    names = ("ranks", "notices", "whole_from_peers", "whole_right", "refused", "whole_refused", "died", "errors")
    runs = {"sqlite": {"figures": dict.fromkeys(names, 1.0)}, "redis": {"figures": dict.fromkeys(names, 2.0)}}
    found = worse(runs)
    assert (found["ranks"], found["errors"]) == (1.0, 2.0)


def test_streams_are_opened_and_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS", 0.2)
    monkeypatch.setattr(streams, "AT_ONCE", 8)
    found = streams.measured(20)
    assert found["streams"] == 20
    assert found["kib_a_stream"] < 1024


def test_a_holder_refuses_whoever_finds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SETTLE_SECONDS", "SECONDS", "RENEW_SECONDS"):
        monkeypatch.setattr(refusing, name, 0.4)
    monkeypatch.setattr(refusing, "own_connections", lambda: None)  # which would last
    found = refusing.measured(5)
    assert found.failed == 0
    assert found.refusals > 0


def test_what_processes_use_is_told_for_each_stretch_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_shares, "EVERY_SECONDS", 0.05)
    with core_shares.CoreShares(time.monotonic(), me=[os.getpid()], nobody=[2**30]) as shares:
        while len(shares.found) < 2:
            sum(range(1000))
    at, used = shares.found[0]
    assert at > 0
    assert set(used) == {"me", "nobody"}
    assert used["nobody"] == 0


def test_a_stream_by_hand_says_what_the_server_tells() -> None:
    server = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory", "drain_seconds": "1"}))
    address, reader = f"127.0.0.1:{server.port}", WatchReader()
    identity = p2p_pb2.SourceIdentity(model_name="bench/by-hand")
    asked = watch_pb2.WatchSourcesRequest(mx_source_id=source_id(identity), worker_id="asks")
    try:
        watches = [reader.open(address, asked) for _ in range(3)]
        told = [iter(watch) for watch in watches]
        assert not any(next(each).ready for each in told)
        with ServerClient(address) as client:
            ready = p2p_pb2.WorkerMetadata(status=p2p_pb2.SOURCE_STATUS_READY, worker_grpc_endpoint="h:1")
            client.publish(identity, ready, "serves")
        for each in told:
            [found] = next(now for now in each if now.ready).ready
            assert (found.worker_id, found.worker_grpc_endpoint) == ("serves", "h:1")
        watches[0].cancel()
        with pytest.raises(ServerUnreachable):
            list(told[0])
    finally:
        server.close()
    for each in told[1:]:
        with pytest.raises(ServerUnreachable):
            list(each)
    with pytest.raises(ServerUnreachable):
        reader.open(address, asked)
