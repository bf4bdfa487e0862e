"""What the commands that ask the server share: clients, exit codes, tables, amounts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mxcore.cli.connection import Connection
from mxserver.wire import (
    FileRefused,
    ModelDownloadError,
    ModelNotFound,
    MxError,
    ServerRefused,
    ServerUnreachable,
    SettingError,
)

if TYPE_CHECKING:
    from mxserver.wire.calls import ServerClient

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_REFUSED = 5
EXIT_DAMAGED = 6
CALL_SECONDS = 10.0

MODEL_EXIT_CODES: dict[type[MxError], int] = {
    SettingError: EXIT_USAGE,
    ServerUnreachable: EXIT_UNREACHABLE,
    ModelNotFound: EXIT_NOT_FOUND,
    ModelDownloadError: EXIT_FAILED,
    ServerRefused: EXIT_REFUSED,
    FileRefused: EXIT_DAMAGED,
}
"""Exit codes of `mx models`; the first kind that fits counts, and any other error is EXIT_FAILED."""
_EXIT_CODES: dict[type[MxError], int] = {SettingError: EXIT_USAGE, ServerUnreachable: EXIT_UNREACHABLE}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@contextmanager
def exiting_on_errors(exit_codes: dict[type[MxError], int], when_unreachable: str = "") -> Iterator[None]:
    """An error ends the command with one line on stderr and its exit code; `when_unreachable` is a second line."""
    try:
        yield
    except (MxError, OSError) as error:
        click.echo(f"mx: {error}", err=True)
        if when_unreachable and isinstance(error, ServerUnreachable):
            click.echo(f"mx: {when_unreachable}", err=True)
        sys.exit(next((code for kind, code in exit_codes.items() if isinstance(error, kind)), EXIT_FAILED))


@contextmanager
def server_client(connection: Connection) -> Iterator[ServerClient]:
    """A client; an error ends the command."""
    from mxserver.wire.calls import ServerClient

    advice = "is it running, and is --server or MODEL_EXPRESS_URL right? `mx doctor` looks closer"
    with (
        exiting_on_errors(_EXIT_CODES, advice),
        ServerClient(connection.address, timeout_seconds=CALL_SECONDS, credentials=connection.credentials) as client,
    ):
        yield client


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, two blanks between them."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def duration(seconds: float) -> str:
    """A length of time in one unit: 7.5 s, 12 min, 3 h, 4 d."""
    for limit, unit, size in ((10, "s", 1), (120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds:.1f} s" if limit == 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def bytes_text(count: float) -> str:
    """Decimal bytes with one figure after the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def refusal_lines(refusals: list[dict[str, Any]]) -> str:
    """Weights that are not shared, with a reason each; empty without any."""
    sides = {"offer": "not offered", "receive": "not taken"}
    lines = [
        f"\n  {each['model_name']} {each['source_id']}: {sides.get(each['side'], each['side'])}, {each['reason']}, "
        f"{each['count']} times; last by {each['worker_id']}: {each['text']}"
        for each in refusals
    ]
    return "".join(["\n\nWeights that are not shared, newest first:", *lines]) if lines else ""
