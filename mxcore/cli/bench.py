"""`mx bench NAME`: runs a bench, of the package `mxbench` or, in a source checkout, of its folder `bench`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import click

from mxcore.cli.failures import EXIT_USAGE

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_HERE = f"More benches run from a source checkout alone, not from {ROOT}."


class BadArgument(click.ClickException):
    """What is wrong with the arguments, in one line."""

    exit_code = EXIT_USAGE


def bench_modules() -> dict[str, str]:
    """Bench name → module: those of mxbench, and `bench/bench_NAME.py` of the checkout this package runs from."""
    folder = ROOT / "bench"
    if folder.is_dir():  # an editable install maps the packages alone, not the folder they lie in
        sys.path += [place for place in (str(ROOT), str(folder)) if place not in sys.path]
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    found = {name.removeprefix("bench_"): f"bench.{name}" for name in names if name.startswith("bench_")}
    installed: dict[str, str] = importlib.import_module("mxbench").COMMANDS
    return found | installed


class BenchGroup(click.Group):
    """Lists the benches; the module of each has a click command called `command`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(bench_modules())

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if not (ROOT / "bench").is_dir():
            formatter.write_paragraph()
            formatter.write_text(NOT_HERE)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        module = bench_modules().get(name)
        if module is None:
            if not (ROOT / "bench").is_dir():
                raise click.UsageError(f"no bench {name!r} is here. {NOT_HERE}")
            return None
        command: click.Command = importlib.import_module(module).command
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            raise BadArgument(" ".join(error.format_message().split())) from error


@click.group(cls=BenchGroup)
def bench() -> None:
    """Benches: each prints what it measured, and with --json one object with a flat map `figures`."""
