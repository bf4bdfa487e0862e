"""`mx bench storm`, small: nobody asks while it waits, one reads for each rank, and nothing fails."""

from __future__ import annotations

import json

from click.testing import CliRunner

from mxcore.cli.main import mx

ARGUMENTS = ["--ranks", "8", "--ranks-per-host", "2", "--processes", "1", "--start-seconds", "0.2"]
ARGUMENTS += ["--read-seconds", "4", "--receive-seconds", "0.2", "--heartbeat-seconds", "1", "--store", "redis"]


def test_a_fleet_starts_over_two_replicas() -> None:
    run = CliRunner().invoke(mx, ["bench", "storm", *ARGUMENTS, "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    figures = result["figures"]
    assert result["errors"] == {}
    assert (figures["ranks"], figures["turns_given_twice"], figures["errors"]) == (8, 0, 0)
    assert figures["readers_of_storage"] >= 2
    assert figures["notices"] + figures["readers_of_storage"] == 8
