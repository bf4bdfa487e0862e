"""`mx bench NAME`: runs a bench of the package `mxbench`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from mxcore.cli.failures import EXIT_USAGE
from mxserver.wire import install_command

ROOT = Path(__file__).resolve().parent.parent.parent


class BadArgument(click.ClickException):
    """What is wrong with the arguments, in one line."""

    exit_code = EXIT_USAGE


def bench_modules() -> dict[str, str]:
    """Bench name → module."""
    benches = ROOT / "bench"
    if (benches / "mxbench").is_dir():  # a checkout: its tests stand in for others; it may not have been installed anew
        sys.path += [place for place in (str(ROOT), str(benches)) if place not in sys.path]
    found: dict[str, str] = importlib.import_module("mxbench").COMMANDS
    return found


def what_is_missing(name: str, error: ModuleNotFoundError) -> str:
    """What a bench needs that is not here. Raises the error again where it is a module of ours."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "mxbench", "mxcore", "mxserver", "vllm_plugin"):
        raise error
    if package == "tests":
        return f"mx bench {name} runs from a source checkout alone: what it measures with is among its tests."
    commands = [install_command(extra) for extra in ("bench", "s3")]
    where = "it is not installed"
    if bringing := [command for command in commands if package.replace("_", "-") in command]:
        where = bringing[0]
    elif package in ("torch", "transformers", "vllm"):
        where = "it comes with vLLM: run this where vLLM is installed"
    return f"mx bench {name} needs {package}: {where}"


def _unable(name: str, why: str) -> click.Command:
    """Listed with the others; whatever it is told, it says why it does not run."""

    def refuse() -> None:
        raise BadArgument(why)

    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return click.Command(name, callback=refuse, help=why, context_settings=anything)


class BenchGroup(click.Group):
    """Lists the benches; the module of each has a click command called `command`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(bench_modules())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        module = bench_modules().get(name)
        if module is None:
            return None
        try:
            command: click.Command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            return _unable(name, what_is_missing(name, error))
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            raise BadArgument(" ".join(error.format_message().split())) from error
        except ModuleNotFoundError as error:
            raise BadArgument(what_is_missing(context.invoked_subcommand or "", error)) from error


@click.group(cls=BenchGroup)
def bench() -> None:
    """Benches: each prints what it measured, and with --json one object with a flat map `figures`."""
