"""What no bench can run with is one line and exit code 2, in every bench."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mxbench.chaos.soak import command as soak
from mxbench.fleet.swarm_simulator import main as simulator
from mxbench.gpu.fleet import command as gpu_fleet
from mxcore.cli.bench import bench_modules
from mxcore.cli.main import mx

NO_AMOUNT = {"seed"}  # any number is one
BENCHES = {name: import_module(module).command for name, module in bench_modules().items()}


def options(command: click.Command) -> Iterator[click.Option]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag and parameter.name not in NO_AMOUNT:
            yield parameter


def amounts() -> list[tuple[str, str, str]]:
    """(bench, option, a value below what it takes) of every option that is a number."""
    found = []
    for bench, command in BENCHES.items():
        for option in options(command):
            if option.type.name in ("integer", "float", "integer range", "float range"):
                least = getattr(option.type, "min", None)
                found.append((bench, option.opts[0], "-1" if least is None or least >= 0 else str(least - 1)))
    return found


def refused(*arguments: str) -> str:
    """The one line."""
    ran = CliRunner().invoke(mx, ["bench", *arguments])
    assert ran.exit_code == 2, ran.output
    [line] = ran.output.strip().splitlines()
    return line


@pytest.mark.parametrize(("bench", "option", "value"), amounts())
def test_an_amount_below_what_can_be(bench: str, option: str, value: str) -> None:
    line = refused(bench, option, value)
    assert option in line
    assert value in line


@pytest.mark.parametrize(
    ("bench", "option"),
    [("transfer", "--scale"), ("fanout", "--receivers"), ("load", "--rounds"), ("object", "--rounds")],
)
def test_none_at_all(bench: str, option: str) -> None:
    assert option in refused(bench, option, "0")


def test_every_folder_and_file_is_looked_for_first(tmp_path: Path) -> None:
    missing, seen = str(tmp_path / "none" / "x"), 0
    for bench, command in BENCHES.items():
        for parameter in command.params:
            made_here = parameter.name == "run"  # `cluster` makes that folder
            if not isinstance(parameter.type, click.Path) or getattr(parameter, "hidden", False) or made_here:
                continue
            seen += 1
            places = [missing for one in command.params if isinstance(one, click.Argument)]
            words = [parameter.opts[0], missing] if isinstance(parameter, click.Option) else []
            assert str(tmp_path / "none") in refused(bench, *words, *places)
    assert seen >= 6


def test_no_such_option_and_no_such_bench() -> None:
    assert "--rownds" in refused("load", "--rownds", "3")
    assert "lod" in refused("lod")


@pytest.mark.parametrize(
    ("command", "words"),
    [(soak, ["--transfers", "0"]), (gpu_fleet, ["--tensors", "-1"]), (simulator, ["--receivers", "1,x"])],
)
def test_those_that_are_no_bench_of_mx(command: click.Command, words: list[str]) -> None:
    ran = CliRunner().invoke(command, words)
    assert ran.exit_code == 2
    assert words[0] in ran.output
