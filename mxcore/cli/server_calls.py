"""What the commands that ask the server share: a client whose errors end the command, and --json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mxcore.cli.connection import Connection
from mxcore.cli.failures import ending_on_errors

if TYPE_CHECKING:
    from mxserver.wire.calls import ServerClient

CALL_SECONDS = 10.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
wide_option = click.option("--wide", is_flag=True, help="Whole ids, and no cell cut to fit the terminal.")


@contextmanager
def server_client(connection: Connection) -> Iterator[ServerClient]:
    """A client; an error ends the command."""
    from mxserver.wire.calls import ServerClient

    with (
        ending_on_errors(),
        ServerClient(connection.address, timeout_seconds=CALL_SECONDS, credentials=connection.credentials) as client,
    ):
        yield client
