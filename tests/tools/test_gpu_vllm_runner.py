"""The kit's runner: a budget, steps that build on each other, results that survive a cut; and the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.transfer.conftest import ROOT
from tools.gpu_vllm import runner
from tools.gpu_vllm.engines import Engines, engines
from tools.gpu_vllm.journal import Journal
from tools.gpu_vllm.machine import Machine
from tools.gpu_vllm.steps import STEPS, Outcome, Run, Step, outcome

ENGINE_STEPS = ("prepare", "default", "a", "b", "kill_receiver", "kill_source", "quantised")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "out")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    machine = Machine(gpu=False)
    with engines(machine, tmp_path) as running:
        yield Run(machine, running, tmp_path, tmp_path / "tiny", tmp_path / "large")


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def good(run: Run) -> Outcome:
    return outcome({"n": 1}, right=True)


def bad(run: Run) -> Outcome:
    return outcome({"n": 2}, right=True, equal=False)


def broken(run: Run) -> Outcome:
    raise ValueError("no such thing")


def hanging(run: Run) -> Outcome:
    """An engine's process that gives no answer before its time is over."""
    return outcome(run.engines.ask("hanging", "live"))


def steps(**given: Callable[[Run], Outcome]) -> dict[str, Step]:
    return {name: Step(call, 1, 60) for name, call in given.items()}


def test_each_result_is_on_disk_before_the_next_step_begins(
    run: Run, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[object]] = []

    def looks(run: Run) -> Outcome:
        seen.append([row["step"] for row in rows(tmp_path / "out")])
        return good(run)

    made = steps(one=looks, two=broken, three=looks, four=bad)
    monkeypatch.setattr(runner, "STEPS", made)
    runner.run_steps(made, run, journal, 60)

    assert seen == [[], ["one", "two"]]
    one, two, three, four = rows(tmp_path / "out")
    assert (one["ok"], three["ok"], four["ok"]) == (True, True, False)
    assert four["wrong"] == ["equal"]
    assert two["error"] == "ValueError: no such thing"
    assert [line.split()[2] for line in journal.table().splitlines()] == ["one", "two", "three", "four"]


def test_what_has_no_time_or_no_ground_is_skipped_and_said(
    run: Run, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        "one": Step(broken, 1, 60),
        "two": Step(good, 1, 60, "one"),
        "three": Step(good, 1000, 2000),
        "four": Step(bad, 1, 60),
        "five": Step(good, 1, 60, "four"),
    }
    monkeypatch.setattr(runner, "STEPS", made)
    runner.run_steps(made, run, journal, 60)

    _, two, three, _, five = rows(tmp_path / "out")
    assert two["skipped"] == "one did not come to an end"
    assert str(three["skipped"]).endswith("s are left, it wants 1000")
    assert five["ok"], "what is not as it should be is no reason to leave out the rest"


def test_a_step_whose_time_is_over_loses_its_engines(
    run: Run, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"one": Step(hanging, 0, 0.02), "two": Step(good, 0, 60)}
    monkeypatch.setattr(runner, "STEPS", made)
    runner.run_steps(made, run, journal, 60)

    one, two = rows(tmp_path / "out")
    assert str(one["error"]).startswith("cut after 0 s: AssertionError: hanging gave no answer to live")
    assert two["ok"]
    assert "===== hanging.log" in (tmp_path / "out" / "logs.txt").read_text()


def test_every_step_that_another_needs_comes_before_it() -> None:
    names = list(STEPS)
    assert all(names.index(step.needs) < names.index(name) for name, step in STEPS.items() if step.needs)
    assert sum(step.least_seconds for step in STEPS.values()) < 540


def test_the_gpu_machine_needs_nothing_but_python_to_begin() -> None:
    """What unpacks the kit is read there before any package of it is installed."""
    code = "import sys; import tools.gpu_vllm.unpack, tools.gpu_vllm.__main__; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[0:0] = ['{ROOT}']; {code}"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert loaded <= {*sys.stdlib_module_names, "tools", "__main__"}, loaded


@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_dry_run_with_real_engines(tmp_path: Path) -> None:
    """The same steps as on the GPU. The benches run in tests/cuda."""
    command = [sys.executable, "-m", "tools.gpu_vllm", "dry-run", "--out", str(tmp_path)]
    ran = subprocess.run([*command, "--steps", ",".join(ENGINE_STEPS)], cwd=ROOT, capture_output=True, text=True)
    about, *found = rows(tmp_path)
    assert ran.returncode == 0, (ran.stdout, ran.stderr[-2000:], found)
    assert about["gpu"] is False
    assert any("instead of" in str(line) for line in about["instead"])  # type: ignore[attr-defined]
    assert [(row["step"], row["ok"]) for row in found] == [(name, True) for name in ENGINE_STEPS]


def test_engines_say_that_no_transfer_is_on_its_way(run: Run) -> None:
    made: Engines = run.engines
    with pytest.raises(ValueError, match="no transfer was seen on its way"):
        made.wait_until_receiving(lambda: False)
