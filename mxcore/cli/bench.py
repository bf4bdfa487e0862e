"""`mx bench NAME`: runs a bench of the source checkout; benches are not installed."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_HERE = f"Benches are not installed: run this from a source checkout, not from {ROOT}."


def bench_modules() -> dict[str, str]:
    """Bench name → module, for every module `bench/bench_NAME.py` of the checkout this package runs from."""
    folder = ROOT / "bench"
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return {name.removeprefix("bench_"): f"bench.{name}" for name in names if name.startswith("bench_")}


class BenchGroup(click.Group):
    """Lists the modules `bench/bench_*.py`; each has a click command called `command`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(bench_modules())

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if not bench_modules():
            formatter.write_paragraph()
            formatter.write_text(NOT_HERE)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        module = bench_modules().get(name)
        if module is None:
            if not bench_modules():
                raise click.UsageError(NOT_HERE)
            return None
        if str(ROOT) not in sys.path:  # an editable install maps the packages alone, not the folder they lie in
            sys.path.append(str(ROOT))
        command: click.Command = importlib.import_module(module).command
        return command


@click.group(cls=BenchGroup)
def bench() -> None:
    """Benches: each prints what it measured, and with --json one object with a flat map `figures`."""
