"""What the commands that ask the server share: a client, exit codes, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mxcore.cli.connection import Connection
from mxcore.cli.models import EXIT_FAILED, EXIT_UNREACHABLE
from mxserver.wire.errors import MxError, ServerUnreachable, SettingError

if TYPE_CHECKING:
    from mxserver.wire.calls.client import ServerClient

EXIT_USAGE = 2
CALL_SECONDS = 10.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@contextmanager
def server_client(connection: Connection) -> Iterator[ServerClient]:
    """A client; an error ends the command with one line and its exit code."""
    from mxserver.wire.calls.client import ServerClient

    try:
        with ServerClient(
            connection.address, timeout_seconds=CALL_SECONDS, credentials=connection.credentials
        ) as client:
            yield client
    except MxError as error:
        click.echo(f"mx: {error}", err=True)
        if isinstance(error, ServerUnreachable):
            click.echo(
                "mx: is it running, and is --server or MODEL_EXPRESS_URL right? `mx doctor` looks closer", err=True
            )
        codes = {SettingError: EXIT_USAGE, ServerUnreachable: EXIT_UNREACHABLE}
        sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED))


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
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
