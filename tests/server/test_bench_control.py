"""`mx bench control`, small: its figures are there, and nothing fails."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mxbench.control.command import CAPACITY_HEAD, capacity_row
from mxcore.cli.main import mx
from tests.server.conftest import ROOT

ARGUMENTS = ["bench", "control", "--workers", "40", "--fleet-workers", "20", "--processes", "2", "--idle-seconds", "2"]
ARGUMENTS += ["--attack-seconds", "0"]  # make test-adversary has them


@pytest.mark.parametrize(("store", "replicas"), [("sqlite", 1), ("redis", 2)])
def test_storm_and_heartbeats_without_an_error(store: str, replicas: int) -> None:
    run = CliRunner().invoke(mx, [*ARGUMENTS, "--store", store, "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    figures = result["figures"]
    assert (result["store"], result["replicas"], result["errors"]) == (store, replicas, {})
    assert (figures["storm_workers"], figures["storm_errors"], figures["idle_errors"]) == (40, 0, 0)
    assert figures["storm_p50_seconds"] <= figures["storm_p99_seconds"] <= figures["storm_max_seconds"]
    assert figures["storm_calls_per_second"] > 0
    assert figures["idle_core_share"] >= figures["idle_redis_core_share"] >= 0
    assert figures["empty_mib"] > 10
    assert figures["storm_workers_per_core_second"] > 0
    row = capacity_row(result)
    assert row.startswith(f"| {store} | {replicas} | 40 |")
    assert row.count("|") == CAPACITY_HEAD[0].count("|") == CAPACITY_HEAD[1].count("|")
    assert CAPACITY_HEAD[0] in (ROOT / "docs" / "how-to" / "run-a-server.md").read_text()


def test_replicas_need_a_store_that_they_share() -> None:
    run = CliRunner().invoke(mx, [*ARGUMENTS, "--replicas", "2"])
    assert run.exit_code == 2
    assert "only servers over Redis share their state" in run.output
