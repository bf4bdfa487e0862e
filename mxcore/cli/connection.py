"""Which server a command calls, and its credentials: --server, TLS and the token. The same for all commands."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from mxserver.wire import SettingError, parse_server_address, setting, split_scheme
from mxserver.wire.credentials import CA_FILE, CERT_FILE, KEY_FILE, TOKEN_FILE, TOKEN_IN_CLEAR, ClientCredentials

SERVER_NAMES = ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS")
"""The environment names of the server's address; the first that is set counts."""

_FLAGS = {
    "tls_ca": ("--tls-ca", CA_FILE),
    "tls_cert": ("--tls-cert", CERT_FILE),
    "tls_key": ("--tls-key", KEY_FILE),
    "token_file": ("--token-file", TOKEN_FILE),
}


@dataclass(frozen=True)
class Connection:
    """What the command line gave; the environment has the rest."""

    server: str | None = None
    flags: dict[str, str] = field(default_factory=dict)  # environment name -> value

    def over(self, other: Connection) -> Connection:
        """This connection, with what it leaves open taken from another one."""
        return Connection(self.server or other.server, {**other.flags, **self.flags})

    @property
    def address(self) -> str:
        """host:port or https://host:port. Raises SettingError."""
        named = (value for name in SERVER_NAMES if (value := setting(os.environ, name)))
        given = self.server or next(named, "localhost")
        address = parse_server_address(given)
        tls = [flag for flag, name in _FLAGS.values() if name in self.flags and flag.startswith("--tls")]
        if tls and split_scheme(address)[0] != "https":
            raise SettingError(
                f"{', '.join(tls)} would have no effect on {address}: write the address as https://{address}"
            )
        return address

    @property
    def credentials(self) -> ClientCredentials:
        """What to trust and to show. Raises SettingError."""
        return ClientCredentials.from_environ({**os.environ, **self.flags})


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets them as its argument `connection`."""

    @click.option(
        "--server",
        metavar="ADDRESS",
        help="The server, host:port or https://host:port. "
        "[MODEL_EXPRESS_URL or MX_SERVER_ADDRESS; default localhost:8001]",
    )
    @click.option("--tls-ca", metavar="FILE", help="Trust this CA, not the system's. [MX_TLS_CA_FILE]")
    @click.option("--tls-cert", metavar="FILE", help="This client's certificate (mTLS). [MX_TLS_CERT_FILE]")
    @click.option("--tls-key", metavar="FILE", help="Its key. [MX_TLS_KEY_FILE]")
    @click.option("--token-file", metavar="FILE", help="The file with the token. [MX_AUTH_TOKEN_PATH]")
    @click.option(
        "--token-in-clear",
        is_flag=True,
        help="Send the token also where others may read it: not https, not loopback. [MX_AUTH_TOKEN_IN_CLEAR]",
    )
    @functools.wraps(command)
    def with_connection(server: str | None, token_in_clear: bool, **given: Any) -> Any:
        flags = {name: value for key, (_, name) in _FLAGS.items() if (value := given.pop(key))}
        if token_in_clear:
            flags[TOKEN_IN_CLEAR] = "1"
        return command(connection=Connection(server, flags), **given)

    return with_connection
