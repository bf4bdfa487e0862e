"""`mx bench storm`, small: nobody asks while it waits, one reads for each rank, and nothing fails."""

from __future__ import annotations

import json

from click.testing import CliRunner

from bench.bench_storm import worse
from mxcore.cli.main import mx

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
