"""`mx bench object`: it runs, every candidate has the same bytes, and the figures are there."""

from __future__ import annotations

import json

from click.testing import CliRunner

from mxbench.object_store.command import command


def test_a_small_run() -> None:
    ran = CliRunner().invoke(command, ["--size-mib", "8", "--rounds", "1", "--latency-ms", "0", "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    assert {run["name"] for run in told["runs"]} == {
        *("ours", "ours_stream", "runai", "boto3"),
        "ours, one connection cut",
        "ours, all connections cut",
    }
    assert all(run["fetched_bytes"] >= told["size_bytes"] for run in told["runs"])
    for name in ("vs_runai", "vs_runai_0ms", "vs_boto3_0ms", "fetched_over_model", "fetched_over_model_after_cut"):
        assert told["figures"][name] > 0
