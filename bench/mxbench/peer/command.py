"""`mx bench peer`: on one machine --listen, on the other --connect; what the link gives, what the product gives.

Raw: plain sockets with 1, 2 and 4 connections, NIXL's one descriptor over TCP and RDMA, and perftest's ib_write_bw
where it is installed on both. The product: each transport that works, few large and many small tensors, in host memory
and, where both have a GPU, in device memory; every byte is verified. Rates are 10^9 bytes a second. Whoever reaches the
port of --listen can start these measurements on that machine: use it in networks that you trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import click

from mxbench.fleet import SHAPES
from mxbench.hosts import DEFAULT_PORT, Host, HostError, listen, over_socket, started_here
from mxbench.peer.measure import DIRECTIONS, Asked, Found, measure
from mxbench.peer.product import TRANSPORTS
from mxbench.results import document, json_option, mib_option, rounds_option

MIB = 1 << 20


@click.command("peer")
@click.option("--listen", "listening", is_flag=True, help="Wait for the other machine.")
@click.option("--connect", metavar="HOST[:PORT]", help="Measure with the machine that listens.")
@click.option("--address", default="", help="With --listen: the address to listen at (default: all).")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True)
@click.option("--once", is_flag=True, help="With --listen: for one connection.")
@mib_option(1024, "Size of the models.")
@rounds_option(3, "Of everything; medians count.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="How long plain connections send.",
)
@click.option(
    "--transport",
    "transports",
    multiple=True,
    type=click.Choice(list(TRANSPORTS)),
    help="Default: those that work, but same-host.",
)
@click.option("--direction", "directions", multiple=True, type=click.Choice(DIRECTIONS), help="Default: both.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES), help="Tensors: few, many. Default: both.")
@json_option
def command(
    listening: bool,
    connect: str | None,
    address: str,
    port: int,
    once: bool,
    mib: int,
    rounds: int,
    seconds: float,
    transports: tuple[str, ...],
    directions: tuple[str, ...],
    shapes: tuple[str, ...],
    as_json: bool,
) -> None:
    """The link between two machines, and what the product makes of it: --listen on one, --connect on the other."""
    if listening == (connect is not None):
        raise click.UsageError("give --listen on one machine, and --connect HOST on the other")
    try:
        if connect is None:
            listen(address, port, lambda line: click.echo(line, err=True), connections=1 if once else None)
            return
        asked = Asked(mib * MIB, rounds, seconds, transports, directions or DIRECTIONS, shapes or SHAPES)
        told = _measured(*_host_and_port(connect, port), asked, quiet=as_json)
    except HostError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(told))
        return
    for name, value in told["figures"].items():
        click.echo(f"{name:44} {value:10.4f} {told['details']['figures'][name]['unit']}")
    for name, reason in told["left_out"].items():
        click.echo(f"left out: {name}: {reason}", err=True)
    for line in told["verdict"]:
        click.echo(line)


def _host_and_port(text: str, port: int) -> tuple[str, int]:
    """HOST, HOST:PORT, [V6]:PORT, V6. Raises click.UsageError."""
    host, colon, number = text.rpartition(":")
    if not colon or (host.count(":") and not host.endswith("]")):
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not number.isdigit() or not 0 < int(number) < 65536:
        raise click.UsageError(f"--connect {text!r} is no HOST or HOST:PORT")
    return host, int(number)


def _measured(host: str, port: int, asked: Asked, *, quiet: bool) -> dict[str, Any]:
    """The document. Raises HostError."""
    with ExitStack() as stack:
        channel = over_socket(host, port)
        there = stack.enter_context(Host(host, channel.there, channel))
        here = stack.enter_context(Host("here", channel.here, started_here()))
        server = there.spawn("server", {"host": there.address})
        found = measure(
            here,
            there,
            asked,
            server.expect("listening")["address"],
            lambda line: None if quiet else click.echo(line, err=True),
        )
        if not found.samples:
            raise HostError(f"nothing could be measured: {found.left_out}")
        machines = {each.name: each.machine() for each in (here, there)}
    return document(
        "peer",
        figures_of(found),
        settings=asked._asdict(),
        samples=found.samples,
        left_out=found.left_out,
        hosts=machines,
        verdict=list(verdict(found, host)),
    )


def figures_of(found: Found) -> dict[str, float]:
    """Medians, and each direction's best transport against the best that the link gave."""
    figures = {name: median(values) for name, values in found.samples.items()}
    for direction in DIRECTIONS:
        (_, link), (_, ours) = found.link(direction), found.best(direction)
        if link and ours:
            figures[f"{direction}_vs_link"] = ours / link
    return {name: round(value, 6) for name, value in figures.items()}


def verdict(found: Found, host: str) -> Iterator[str]:
    """A line a direction."""
    for direction in DIRECTIONS:
        (raw, link), (ours, rate) = found.link(direction), found.best(direction)
        way = f"{host} -> here" if direction == "take" else f"here -> {host}"
        if raw and ours:
            transport = ours.removesuffix("_few").removesuffix("_many").replace("_", "-")
            share = f"{100 * rate / link:.0f} % of the link by {transport}"
            yield f"{way}: {share} ({rate:.3g} of {link:.3g} GB/s by {raw.replace('_', ' ')})"
        elif raw:
            yield f"{way}: the product moved nothing; the link gives {link:.3g} GB/s by {raw.replace('_', ' ')}"
