"""`mx`: the group that finds its subcommands by name.

A new subcommand is one line in `COMMANDS`: its name, where its click command is, and its help line (kept here so
that `mx --help` imports nothing).
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

import click

from mxcore.cli.failures import EXIT_INTERRUPTED, end, tell, tell_as_json
from mxserver.wire import MxError


class Subcommand(NamedTuple):
    target: str  # "module:attribute" of the click command
    help: str


COMMANDS: dict[str, Subcommand] = {
    "bench": Subcommand("mxcore.cli.bench:bench", "Measure links, transfers, loads, fleets (JSON with --json)."),
    "completion": Subcommand("mxcore.cli.completion:completion", "The script that completes mx in a shell."),
    "doctor": Subcommand("mxcore.cli.doctor.command:doctor", "What works on this machine, what does not, and why."),
    "explain": Subcommand("mxcore.cli.explain.command:explain", "Where a worker would take weights from, and why."),
    "models": Subcommand("mxcore.cli.models:models", "The server's model cache: get, list, rm, pin, validate."),
    "rollout": Subcommand("mxcore.cli.rollout.command:rollout", "Another version of a model for running engines."),
    "sources": Subcommand("mxcore.cli.sources:sources", "The workers that the server knows."),
    "status": Subcommand("mxcore.cli.status:status", "The server's health, its models, and the loads that run."),
}


class LazyGroup(click.Group):
    """A click group whose commands come from a table and are imported at their first use."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        if os.environ.get("NO_COLOR"):  # no-color.org; click has no such rule
            more["color"] = False
        return super().make_context(*arguments, **more)

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].target.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mx-modelexpress", prog_name="mx")
def mx() -> None:
    """Model weights for fleets of LLM servers.

    The server is `mxserver`; workers are started with `vllm serve MODEL --load-format mx`.
    """


def main() -> None:
    """Runs `mx`. What goes wrong is one line on stderr, and with --json an object on stdout (`failures`); Ctrl-C is
    exit code 130."""
    as_json = "--json" in sys.argv[1:]
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # or its warnings stand before what --json prints
    try:
        sys.exit(mx.main(prog_name="mx", standalone_mode=False))
    except click.Abort:
        tell("interrupted", "MX_INTERRUPTED", EXIT_INTERRUPTED, as_json=as_json)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        if as_json:
            tell_as_json(error.format_message(), "MX_USAGE", error.exit_code)
        sys.exit(error.exit_code)
    except MxError as error:
        end(error, as_json=as_json)
