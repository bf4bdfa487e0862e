"""How `mx` ends when something fails: one line on stderr, an exit code for each cause, one JSON object with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from mxcore.errors import EngineUnreachable
from mxserver.wire import (
    FileRefused,
    ModelDownloadError,
    ModelNotFound,
    MxError,
    ServerRefused,
    ServerUnreachable,
    SettingError,
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_REFUSED = 5
EXIT_DAMAGED = 6
EXIT_INTERRUPTED = 130  # as shells say it of SIGINT: 128 and the signal's number

_EXIT_CODES: dict[type[MxError], int] = {
    SettingError: EXIT_USAGE,
    ServerUnreachable: EXIT_UNREACHABLE,
    EngineUnreachable: EXIT_UNREACHABLE,
    ModelNotFound: EXIT_NOT_FOUND,
    ModelDownloadError: EXIT_FAILED,
    ServerRefused: EXIT_REFUSED,
    FileRefused: EXIT_DAMAGED,
}
"""The first kind that fits counts; any other error is EXIT_FAILED."""

_ADVICE = {
    ServerUnreachable.code: "is it running, and is --server or MODEL_EXPRESS_URL right? `mx doctor` looks closer",
}


def exit_code(error: Exception) -> int:
    """The same for every command."""
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), EXIT_FAILED)


def end(error: Exception, *, as_json: bool) -> NoReturn:
    """Tells of the error and exits. What is printed as JSON has the same form for every command:

    ``{"error": {"code": "MX_SERVER_UNREACHABLE", "message": "…", "exit_code": 3}}``.
    """
    code = exit_code(error)
    stable = error.stable_code if isinstance(error, MxError) else "MX_ERROR"
    tell(str(error), stable, code, as_json=as_json)
    sys.exit(code)


def tell(message: str, stable_code: str, code: int, *, as_json: bool) -> None:
    """The line, the advice that belongs to the error, and the object."""
    click.echo(f"mx: {message}", err=True)
    if advice := _ADVICE.get(stable_code):
        click.echo(f"mx: {advice}", err=True)
    if as_json:
        tell_as_json(message, stable_code, code)


def tell_as_json(message: str, stable_code: str, code: int) -> None:
    """The object alone."""
    click.echo(json.dumps({"error": {"code": stable_code, "message": message, "exit_code": code}}))


@contextmanager
def ending_on_errors() -> Iterator[None]:
    """An error within ends the command; its option `--json` counts."""
    try:
        yield
    except (MxError, OSError) as error:
        context = click.get_current_context(silent=True)
        end(error, as_json=bool(context and context.params.get("as_json")))
