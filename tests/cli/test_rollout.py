"""`mx rollout` over the real route: waves, readiness, stop and back, and going on with what engines say of themselves.

The engines behind the route are small ones; tests/vllm/test_rollout.py has one of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mxcore.cli.main import mx
from mxcore.cli.rollout.waves import wanted_of
from tests.cli.mx_process import mx as run_mx
from tests.plugin.small_engine import WAIT_SECONDS, Serving, SmallEngine

GONE = "http://127.0.0.1:1"


@pytest.fixture
def engines() -> Iterator[list[Serving]]:
    started = [Serving(SmallEngine()) for _ in range(3)]
    yield started
    for each in started:
        each.close()


def rolled(engines: list[Serving], *more: str, to: str = "two", model: str = "demo") -> tuple[int, dict[str, Any], str]:
    """The exit code, the JSON, and what was told meanwhile."""
    urls = [engine.url for engine in engines]
    ran = CliRunner().invoke(mx, ["rollout", model, "--to", to, "--json", "--engines", *urls, *more])
    return ran.exit_code, json.loads(ran.stdout), ran.stderr


def outcomes(told: dict[str, Any]) -> list[str]:
    return [engine["outcome"] for engine in told["engines"]]


def versions(engines: list[Serving]) -> list[str]:
    return [engine.engine.ranks[0]["version"] for engine in engines]


def test_wave_by_wave_and_called_again_it_leaves_all_alone(engines: list[Serving]) -> None:
    code, told, _ = rolled(engines, "--dry-run")
    assert (code, told["complete"], outcomes(told)) == (0, False, ["to do"] * 3)
    assert all(engine.engine.calls == [] for engine in engines)
    code, told, said = rolled(engines, "--at-once", "2")
    assert (code, told["complete"], outcomes(told)) == (0, True, ["updated"] * 3)
    assert [engine["version"] for engine in told["engines"]] == versions(engines) == ["two"] * 3
    assert said.count("one -> two") == said.count("updated after") == 3
    calls = [list(engine.engine.calls) for engine in engines]
    code, told, _ = rolled(engines)
    assert (code, told["complete"], outcomes(told)) == (0, True, ["had it"] * 3)
    assert [engine.engine.calls for engine in engines] == calls


def test_a_failure_ends_it_and_those_before_go_back(engines: list[Serving]) -> None:
    engines[1].engine.fails = ["before"]
    code, told, _ = rolled(engines)
    assert (code, told["complete"], outcomes(told)) == (1, False, ["back", "failed", "to do"])
    assert versions(engines) == ["one"] * 3
    assert "before the first byte" in told["engines"][1]["trouble"]
    assert engines[2].engine.calls == []
    code, told, _ = rolled(engines)
    assert (code, versions(engines)) == (0, ["two"] * 3)


def test_without_back_they_stay_and_it_goes_on_later(engines: list[Serving]) -> None:
    engines[2].engine.fails = ["after"]
    code, told, _ = rolled(engines, "--no-back", "--at-once", "2")
    assert (code, outcomes(told)) == (1, ["updated", "updated", "failed"])
    assert [engine["version"] for engine in told["engines"]] == ["two", "two", ""]  # it must not answer
    code, told, _ = rolled(engines, to="one")  # the version that the failed one has by name, but not whole
    assert (code, outcomes(told)) == (0, ["updated"] * 3)
    assert versions(engines) == ["one"] * 3


def test_a_folder_is_asked_about_again_as_its_files_may_be_others(engines: list[Serving], tmp_path: Path) -> None:
    assert rolled(engines, to=str(tmp_path))[0] == 0
    calls = [list(engine.engine.calls) for engine in engines]
    code, told, _ = rolled(engines, to=str(tmp_path))
    assert (code, outcomes(told)) == (0, ["had it"] * 3)
    assert [engine.engine.calls for engine in engines] == calls
    engines[1].engine.ranks[0]["checkpoint"] = "of other files"
    code, told, _ = rolled(engines, to=str(tmp_path))
    assert (code, outcomes(told)) == (0, ["had it", "updated", "had it"])


def test_what_is_published_is_named_by_its_uri(engines: list[Serving]) -> None:
    uri = "mx://team/policy/7"
    assert wanted_of(uri) == {"uri": uri, "version": uri}
    ran = CliRunner().invoke(mx, ["rollout", "demo", "--to", uri, "--json", "--engines", engines[0].url])
    assert json.loads(ran.stdout)["engines"][0]["version"] == uri


def test_an_update_that_is_under_way_is_waited_for(engines: list[Serving]) -> None:
    """As one that a call before began, which was interrupted."""
    busy = engines[0]
    busy.engine.may_go_on.clear()
    command = ["rollout", "demo", "--to", "two", "--json", "--engines"]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_mx, *command, busy.url)
        assert busy.engine.has_begun.wait(WAIT_SECONDS)
        before = busy.asked.count("GET /mx/update")
        second = pool.submit(run_mx, *command, *(engine.url for engine in engines))
        while busy.asked.count("GET /mx/update") == before and not second.done():
            wait([second], 0.01)
        busy.engine.may_go_on.set()
        ran = [future.result() for future in (first, second)]
    assert [(each.code, each.json()["complete"]) for each in ran] == [(0, True), (0, True)]
    assert outcomes(ran[1].json()) == ["had it", "updated", "updated"]
    assert busy.engine.calls.count("update") == 1
    assert versions(engines) == ["two"] * 3


def test_nothing_begins_where_an_engine_is_missing_or_serves_something_else(engines: list[Serving]) -> None:
    code, told, _ = rolled(engines, GONE)
    assert (code, told["error"]["code"]) == (3, "MX_ENGINE_UNREACHABLE")
    code, told, _ = rolled(engines, model="other")
    assert (code, told["error"]["code"]) == (2, "MX_SETTING")
    assert "serves demo, and not other" in told["error"]["message"]
    code, told, _ = rolled(engines, "ftp://engine")
    assert (code, told["error"]["code"]) == (2, "MX_SETTING")
    engines[1].engine.takes_updates = False
    code, told, _ = rolled(engines)
    assert (code, told["error"]["code"]) == (3, "MX_ENGINE_UNREACHABLE")
    assert "--weight-transfer-config" in told["error"]["message"]
    assert all(engine.engine.calls == [] for engine in engines)


def test_people_get_a_table(engines: list[Serving]) -> None:
    ran = CliRunner().invoke(mx, ["rollout", "demo", "--to", "two", "--engines", engines[0].url])
    assert ran.exit_code == 0
    head, row = ran.stdout.splitlines()
    assert head.split() == ["engine", "before", "now", "outcome", "seconds", "trouble"]
    assert row.split()[:4] == [engines[0].url, "one", "two", "updated"]
