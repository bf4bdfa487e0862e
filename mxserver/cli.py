"""The command `mxserver`. Nothing heavy is imported before the server starts: --help is fast."""

from __future__ import annotations

import sys

import click

from mxserver import __version__
from mxserver.wire.environment import BY_NAME
from mxserver.wire.errors import MxError, SettingError

EXIT_FAILED = 1
EXIT_BAD_SETTING = 2

EPILOG = """
\b
Each setting is also read from the environment name in brackets; a flag wins. A value that breaks its rule
keeps the server from starting (exit code 2). SIGTERM and SIGINT drain; a second one ends it at once.
\b
Examples:
  mxserver
  mxserver --port 9001 --store-path /var/lib/mxserver/state.sqlite3
  mxserver --host 127.0.0.1 --port 0 --store memory --log-level debug
  MX_SERVER_ADDRESS=127.0.0.1:8001 vllm serve MODEL --load-format mx
"""


def _help(name: str, default: str) -> str:
    meaning = BY_NAME[name].meaning
    return f"{meaning[0].upper()}{meaning[1:]}. [{name}; default {default}]"


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--host", metavar="ADDRESS", help=_help("MODEL_EXPRESS_SERVER_HOST", "0.0.0.0"))  # noqa: S104
@click.option("--port", metavar="PORT", help=_help("MODEL_EXPRESS_SERVER_PORT", "8001"))
@click.option("--metrics-port", metavar="PORT", help=_help("MODEL_EXPRESS_SERVER_METRICS_PORT", "9401"))
@click.option("--store", metavar="sqlite|memory", help=_help("MX_METADATA_BACKEND", "sqlite"))
@click.option("--store-path", metavar="FILE", help=_help("MX_STORE_PATH", "mxserver/state.sqlite3 in ~/.local/state"))
@click.option(
    "--heartbeat-timeout",
    "heartbeat_timeout_seconds",
    metavar="SECONDS",
    help=_help("MX_HEARTBEAT_TIMEOUT_SECS", "90"),
)
@click.option("--gc-timeout", "gc_timeout_seconds", metavar="SECONDS", help=_help("MX_GC_TIMEOUT_SECS", "3600"))
@click.option(
    "--cache-dir", "cache_directory", metavar="FOLDER", help=_help("MODEL_EXPRESS_CACHE_DIRECTORY", "as the hub's own")
)
@click.option("--cache-max-bytes", metavar="BYTES", help=_help("MX_CACHE_MAX_BYTES", "0"))
@click.option("--cache-min-free-bytes", metavar="BYTES", help=_help("MX_CACHE_MIN_FREE_BYTES", "0"))
@click.option("--cache-lease", "cache_lease_seconds", metavar="SECONDS", help=_help("MX_CACHE_LEASE_SECS", "30"))
@click.option("--file-sources", metavar="FOLDERS", help=_help("MX_FILE_SOURCES", "none"))
@click.option("--not-ready", "not_ready_seconds", metavar="SECONDS", help=_help("MX_SERVER_NOT_READY_SECS", "0"))
@click.option("--drain", "drain_seconds", metavar="SECONDS", help=_help("MX_SERVER_DRAIN_SECS", "10"))
@click.option("--log-level", metavar="debug|info|warning|error", help=_help("MODEL_EXPRESS_LOG_LEVEL", "info"))
@click.option("--log-format", metavar="text|json", help=_help("MX_LOG_FORMAT", "text"))
@click.option("--traces", metavar="off|otlp", help=_help("MX_TRACES", "off"))
@click.version_option(__version__, prog_name="mxserver")
def main(**flags: str | None) -> None:
    """Tells LLM workers which other workers have the weights they need.

    The weights themselves go from worker to worker. The port that is listened on is in the log line
    "listening on HOST:PORT" on stderr.
    """
    try:
        code = _start(flags)
    except MxError as error:
        print(f"mxserver: {error}", file=sys.stderr)  # noqa: T201
        code = EXIT_BAD_SETTING if isinstance(error, SettingError) else EXIT_FAILED
    sys.exit(code)


def _start(flags: dict[str, str | None]) -> int:
    import logging
    import os

    from mxserver import logs, server, settings
    from mxserver.wire.environment import warnings_for

    chosen = settings.load_settings(flags)
    logs.set_up(chosen.log_level, chosen.log_format)
    for line in warnings_for(os.environ, "server"):
        logging.getLogger("mxserver").warning(line)
    return server.run(chosen)
