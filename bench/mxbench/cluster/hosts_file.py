"""The machines of a cluster, a line each: a name, how it is reached, what the others reach it by.

node-a  ssh=me@node-a  python=/opt/mx/bin/python  address=10.0.0.1
node-b  ssh=node-b                    # python3; address: node-b
node-c  agent=node-c:6570             # `mx bench peer --listen` runs there
node-d  here  address=10.0.0.4        # this machine
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click

from mxbench.hosts import DEFAULT_PORT, Channel, Host, HostError, over_socket, over_ssh, started_here

__all__ = ["HostLine", "parse_hosts", "read_hosts"]

_KEYS = ("ssh", "agent", "python", "address")
_LEAST = 2


class HostLine(NamedTuple):
    """One machine. One of `ssh` and `agent` is empty; both: this machine."""

    name: str
    address: str
    ssh: str = ""
    agent: str = ""
    python: str = "python3"

    def connect(self, ssh_config: str | None = None) -> Host:
        """Raises HostError."""
        try:
            return Host(self.name, self.address, self._channel(ssh_config))
        except HostError as error:
            raise HostError(str(error) if str(error).startswith(self.name) else f"{self.name}: {error}") from error

    def _channel(self, ssh_config: str | None) -> Channel:
        if self.ssh:
            return over_ssh(self.ssh, self.python, ssh_config)
        if self.agent:
            host, _, port = self.agent.rpartition(":")
            return over_socket(host, int(port))
        return started_here()


def read_hosts(file: Path) -> list[HostLine]:
    """Raises click.UsageError with the line that is wrong."""
    return parse_hosts(file.read_text(), str(file))


def parse_hosts(text: str, name: str = "hosts") -> list[HostLine]:
    """As `read_hosts`."""
    found: list[HostLine] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            host = _host(words)
            if any(host.name == other.name for other in found):
                raise ValueError(f"{host.name} is there twice")
        except ValueError as error:
            raise click.UsageError(f"{name}, line {number}: {error}") from error
        found.append(host)
    if len(found) < _LEAST:
        raise click.UsageError(f"{name} names {len(found)} machines: a cluster has at least {_LEAST}")
    return found


def _host(words: list[str]) -> HostLine:
    name, *rest = words
    is_here = "here" in rest
    values = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if word == "here":
            continue
        if key not in _KEYS or not equals or not value:
            raise ValueError(f"{word!r} is none of here, {', '.join(f'{key}=…' for key in _KEYS)}")
        values[key] = value
    if is_here + ("ssh" in values) + ("agent" in values) > 1:
        raise ValueError("ssh=, agent= and here exclude each other")
    if "agent" in values:
        host, colon, port = values["agent"].rpartition(":")
        if not colon:
            host, port = values["agent"], str(DEFAULT_PORT)
        if not host or not port.isdigit():
            raise ValueError(f"agent={values['agent']} is no HOST:PORT")
        values["agent"] = f"{host}:{port}"
        values.setdefault("address", host)
    elif not is_here:
        values.setdefault("ssh", name)
        values.setdefault("address", values["ssh"].rpartition("@")[2])
    values.setdefault("address", name)
    return HostLine(name, **values)
