"""A pod of the manifest's Job: the first one measures, the others wait for it and end when it says so.

python -m mxbench.cluster.pod --count N --named 'mx-bench-{index}.mx-bench' -- ARGUMENTS of `mx bench cluster`
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click

from mxbench.cluster.hosts_file import HostLine
from mxbench.hosts import DEFAULT_PORT, HostError, finish, listen, over_socket

_START_SECONDS = 600.0
_AGAIN_SECONDS = 1.0


def lines(named: str, count: int, port: int) -> list[str]:
    """The hosts file of the first pod."""
    names = [named.format(index=index) for index in range(count)]
    return [f"{names[0]} here", *(f"{name} agent={name}:{port}" for name in names[1:])]


def _wait_for(hosts: list[HostLine], seconds: float) -> None:
    """Until each listens: pods start when they start. Raises HostError."""
    deadline = time.monotonic() + seconds
    for host in hosts:
        while host.agent:
            try:
                over_socket(host.agent.rpartition(":")[0], int(host.agent.rpartition(":")[2])).close()
                break
            except HostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_SECONDS)


@click.command("pod")
@click.option("--count", type=click.IntRange(2), required=True, help="Pods of the job.")
@click.option("--named", required=True, help="A pod's name, with {index} in it.")
@click.option("--port", type=click.IntRange(1, 65535), default=DEFAULT_PORT, show_default=True)
@click.argument("arguments", nargs=-1)
def main(count: int, named: str, port: int, arguments: tuple[str, ...]) -> None:
    """What the pod with this JOB_COMPLETION_INDEX does."""
    from mxbench.cluster.command import command
    from mxbench.cluster.hosts_file import parse_hosts

    index = int(os.environ["JOB_COMPLETION_INDEX"])
    if index:
        own = named.format(index=index) if named[:1].isdigit() else ""  # addresses in tests; names may not resolve yet
        listen(own, port, lambda line: click.echo(line, err=True), until_finished=True)
        return
    text = "\n".join(lines(named, count, port))
    hosts = parse_hosts(text)
    _wait_for(hosts, _START_SECONDS)
    with tempfile.TemporaryDirectory(prefix="mx-bench-cluster-") as place:
        (Path(place) / "hosts").write_text(text)
        words = ["--hosts", str(Path(place) / "hosts"), "--run", str(Path(place) / "run"), *arguments]
        try:
            command.main(words, prog_name="mx bench cluster", standalone_mode=False)
        finally:
            for host in hosts:
                if host.agent:
                    finish(host.agent.rpartition(":")[0], int(host.agent.rpartition(":")[2]))


if __name__ == "__main__":
    sys.exit(main())
