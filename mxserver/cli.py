"""The command `mxserver`. Nothing heavy is imported before the server starts: --help is fast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mxserver import __version__
from mxserver.wire import VARIABLES, MxError, SettingError

if TYPE_CHECKING:
    from mxserver.settings import ServerSettings

EXIT_FAILED = 1
EXIT_BAD_SETTING = 2

EPILOG = """
\b
Each setting is also read from the environment name in brackets, and from the --config file; a flag wins over the
environment, that over the file. A value that breaks its rule keeps the server from starting (exit code 2).
SIGTERM and SIGINT drain; a second one ends it at once.
\b
Examples:
  mxserver
  mxserver --port 9001 --store-path /var/lib/mxserver/state.sqlite3
  mxserver --host 127.0.0.1 --port 0 --store memory --log-level debug
  mxserver --store redis --redis-host redis --print-config > mxserver.toml
  mxserver --config mxserver.toml --check-config
  MX_SERVER_ADDRESS=127.0.0.1:8001 vllm serve MODEL --load-format mx
"""


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each setting that has a flag; its value comes under the environment name."""
    for variable in reversed([variable for variable in VARIABLES if variable.flag]):
        flag, metavar = variable.flag.split(" ")
        meaning = f"{variable.meaning[0].upper()}{variable.meaning[1:]}."
        text = f"{meaning} [{variable.name}; default {variable.default}]"
        command = click.option(flag, variable.name, metavar=metavar, help=text)(command)
    return command


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@_with_flags
@click.option("--config", metavar="FILE", help="TOML file with settings, by the names that --print-config shows.")
@click.option("--print-config", is_flag=True, help="Print the settings in force, as a settings file, and end.")
@click.option("--check-config", is_flag=True, help="Look at settings and files, say what is wrong (2), and end.")
@click.version_option(__version__, prog_name="mxserver")
def main(config: str | None, print_config: bool, check_config: bool, **flags: str | None) -> None:
    """Tells LLM workers which other workers have the weights they need.

    The weights themselves go from worker to worker. The port that is listened on is in the log line
    "listening on HOST:PORT" on stderr.
    """
    try:
        code = _start(flags, config, print_config=print_config, check_config=check_config)
    except MxError as error:
        print(f"mxserver: {error}", file=sys.stderr)  # noqa: T201
        code = EXIT_BAD_SETTING if isinstance(error, SettingError) else EXIT_FAILED
    sys.exit(code)


def _start(flags: dict[str, str | None], config: str | None, *, print_config: bool, check_config: bool) -> int:
    import logging
    import os

    from mxserver import logs, settings
    from mxserver.wire import warnings_for

    given = {settings.FIELDS[name]: value for name, value in flags.items()}
    chosen, origins = settings.load_with_origins(given, settings.config_of(config))
    logs.set_up(chosen.log_level, chosen.log_format)
    for line in warnings_for(os.environ, "server"):
        logging.getLogger("mxserver").warning(line)
    if print_config:
        click.echo("\n".join(settings.as_config(chosen, origins)))
    if check_config:
        from mxserver.security import setup

        setup.authenticator(chosen)
        setup.credentials(chosen)
        _import_extras(chosen)
        if warning := setup.warning(chosen):
            logging.getLogger("mxserver").warning(warning)
        click.echo("mxserver: the settings are good", err=True)
    if print_config or check_config:
        return 0

    from mxserver import server

    return server.run(chosen)


def _import_extras(chosen: ServerSettings) -> None:
    """Raises SettingError if a setting needs a package that is not installed."""
    if chosen.store == "redis":
        import mxserver.store.redis  # noqa: F401
    if chosen.traces == "otlp":
        from mxserver.tracing import otlp_provider

        otlp_provider().shutdown()
