"""The command `mxserver`. Nothing heavy is imported before the server starts: --help is fast."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mxserver import __version__
from mxserver.wire import BY_NAME, MxError, SettingError

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


def _help(name: str, default: str) -> str:
    meaning = BY_NAME[name].meaning
    return f"{meaning[0].upper()}{meaning[1:]}. [{name}; default {default}]"


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--host", metavar="ADDRESS", help=_help("MODEL_EXPRESS_SERVER_HOST", "0.0.0.0"))  # noqa: S104
@click.option("--port", metavar="PORT", help=_help("MODEL_EXPRESS_SERVER_PORT", "8001"))
@click.option("--files-port", metavar="PORT|off", help=_help("MX_SERVER_FILES_PORT", "8002"))
@click.option("--metrics-port", metavar="PORT|off", help=_help("MODEL_EXPRESS_SERVER_METRICS_PORT", "9401"))
@click.option("--metrics-hosts", metavar="NAMES", help=_help("MX_SERVER_METRICS_HOSTS", "those of the cluster"))
@click.option("--metrics-tls", metavar="auto|off", help=_help("MX_SERVER_METRICS_TLS", "auto"))
@click.option("--store", metavar="sqlite|redis|memory", help=_help("MX_METADATA_BACKEND", "sqlite"))
@click.option("--store-path", metavar="FILE", help=_help("MX_STORE_PATH", "mxserver/state.sqlite3 in ~/.local/state"))
@click.option("--redis-url", metavar="URL", help=_help("REDIS_URL", "none"))
@click.option("--redis-host", metavar="HOST", help=_help("MX_REDIS_HOST", "localhost"))
@click.option("--redis-port", metavar="PORT", help=_help("MX_REDIS_PORT", "6379"))
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
@click.option("--model-sources", metavar="NAMES", help=_help("MX_MODEL_SOURCES", "all"))
@click.option("--download-ignore", metavar="PATTERNS", help=_help("MX_DOWNLOAD_IGNORE", "auto"))
@click.option("--download-allow", metavar="PATTERNS", help=_help("MX_DOWNLOAD_ALLOW", "all"))
@click.option("--tls-cert", "tls_cert_file", metavar="FILE", help=_help("MX_TLS_CERT_FILE", "none: no TLS"))
@click.option("--tls-key", "tls_key_file", metavar="FILE", help=_help("MX_TLS_KEY_FILE", "none"))
@click.option(
    "--tls-client-ca", "tls_client_ca_file", metavar="FILE", help=_help("MX_TLS_CLIENT_CA_FILE", "none: any client")
)
@click.option("--auth", metavar="off|file|kubernetes", help=_help("MX_AUTH", "off"))
@click.option("--auth-file", metavar="FILE", help=_help("MX_AUTH_FILE", "none"))
@click.option("--auth-audience", metavar="NAMES", help=_help("MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES", "the API server's own"))
@click.option(
    "--auth-accounts",
    metavar="NAMES",
    help=_help("MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS", "those of the access file"),
)
@click.option(
    "--auth-cache",
    "auth_cache_seconds",
    metavar="SECONDS",
    help=_help("MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS", "60"),
)
@click.option("--kubernetes-api", metavar="URL", help=_help("MX_KUBERNETES_API", "https://kubernetes.default.svc"))
@click.option("--limits", metavar="NAME=NUMBER,...", help=_help("MX_SERVER_LIMITS", "as in docs/settings.md"))
@click.option("--keepalive", "keepalive_seconds", metavar="SECONDS", help=_help("MX_SERVER_KEEPALIVE_SECS", "30"))
@click.option("--not-ready", "not_ready_seconds", metavar="SECONDS", help=_help("MX_SERVER_NOT_READY_SECS", "0"))
@click.option("--drain", "drain_seconds", metavar="SECONDS", help=_help("MX_SERVER_DRAIN_SECS", "10"))
@click.option("--log-level", metavar="debug|info|warning|error", help=_help("MODEL_EXPRESS_LOG_LEVEL", "info"))
@click.option("--log-format", metavar="text|json", help=_help("MODEL_EXPRESS_LOG_FORMAT", "text"))
@click.option("--traces", metavar="off|otlp", help=_help("MX_TRACES", "off"))
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

    chosen, origins = settings.load_with_origins(flags, settings.config_of(config))
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
