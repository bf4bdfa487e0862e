"""One holder, one receiver on this host: the transfer's rate against the transport's and the machine's limits."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from array import array
from typing import Any

import click
import numpy as np

from bench.fleet import Fleet
from mxcore.digest import xxh3_64
from mxcore.nixl_agent import NixlAgent
from mxcore.transfer.transports import ucx_environment

MIB = 1 << 20
_IDLE_SECONDS = 2.0


def transfer_rate(transport: str, model_bytes: int, tensors: int, repeats: int) -> float:
    """10^9 bytes a second of `Membership.receive`, verified; the best of some."""
    task = {
        "model": "bench/transfer",
        "content": 5,
        "model_bytes": model_bytes,
        "chunk_bytes": 16 * MIB,
        "strategy": "star",
        "tensors": tensors,
    }
    rates = []
    with Fleet() as fleet:
        fleet.add({**task, "role": "seed"}, transport=transport).expect("serving")
        target = fleet.add({**task, "role": "receiver"}, transport=transport)
        target.expect("ready")
        for _ in range(repeats):
            target.send("start")
            done = target.expect("done")
            if not done["right"] or done["path"] != "p2p":
                raise click.ClickException(f"the transfer failed: {done}")
            rates.append(model_bytes / done["receive_seconds"] / 1e9)
            target.send("again")
            target.expect("ready")
    return max(rates)


def socket_rate(count: int) -> float:
    """10^9 bytes a second of one TCP connection over loopback, between two processes."""
    data = np.ones(8 * MIB, np.uint8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if child == 0:
            with socket.create_connection(server.getsockname()) as out:
                for _ in range(count // data.nbytes):
                    out.sendall(data)
            os._exit(0)
        connection, _ = server.accept()
        with connection:
            received, started = 0, time.monotonic()
            buffer = memoryview(np.ones(MIB, np.uint8)).cast("B")
            while got := connection.recv_into(buffer):
                received += got
            seconds = time.monotonic() - started
        os.waitpid(child, 0)
    return received / seconds / 1e9


def memcpy_rate(count: int) -> float:
    """10^9 bytes a second of a copy by one thread into memory that was touched."""
    source, target = np.ones(count, np.uint8), np.ones(count, np.uint8)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return count / min(seconds) / 1e9


def digest_rate(count: int) -> float:
    """10^9 bytes a second of verification by one thread."""
    data = np.ones(count, np.uint8)
    started = time.perf_counter()
    xxh3_64(data)
    return count / (time.perf_counter() - started) / 1e9


def registration_ratio(tensors: int, tensor_bytes: int = 4096) -> float:
    """How much longer registering tensors one by one takes than registering their region."""
    memory = np.ones(tensors * tensor_bytes, np.uint8)
    address = int(memory.ctypes.data)

    def seconds(cut: int) -> float:
        spent = []
        for _ in range(3):
            with ucx_environment("tcp,self"):
                agent = NixlAgent("mx-bench-registration")
            started = time.perf_counter()
            for begin in range(0, memory.nbytes, cut):
                agent.register(array("Q", [address + begin]), array("Q", [cut]))
            spent.append(time.perf_counter() - started)
            agent.destroy()
        return statistics.median(spent)

    return seconds(tensor_bytes) / seconds(memory.nbytes)


def idle_share() -> float:
    """The share of a core that an idle agent takes."""
    with ucx_environment("tcp,self"):
        agent = NixlAgent("mx-bench-idle")
    before, started = time.process_time(), time.monotonic()
    threading.Event().wait(_IDLE_SECONDS)
    share = (time.process_time() - before) / (time.monotonic() - started)
    agent.destroy()
    return share


@click.command()
@click.option("--megabytes", default=1000, show_default=True, help="Size of the model, 20,000 tensors of it or 8.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(megabytes: int, repeats: int, as_json: bool) -> None:
    """Transfer between two processes of this host, against what socket, memcpy and digest do in the same run."""
    model_bytes = megabytes * 1_000_000 // MIB * MIB
    socket_gbs, memcpy_gbs = socket_rate(model_bytes), memcpy_rate(model_bytes)
    verify_gbs = digest_rate(model_bytes)
    rates: dict[str, float] = {}
    for transport in ("tcp", "same-host"):
        for tensors in (1, 20_000):
            rates[f"{transport}, {tensors} tensors"] = transfer_rate(transport, model_bytes, tensors, repeats)
            click.echo(f"{transport}, {tensors} tensors: {rates[f'{transport}, {tensors} tensors']:.2f} GB/s", err=True)
    one_tcp, one_host = rates["tcp, 1 tensors"], rates["same-host, 1 tensors"]
    figures: dict[str, Any] = {
        "many_vs_one_tensor_tcp": round(rates["tcp, 20000 tensors"] / one_tcp, 3),
        "many_vs_one_tensor_same_host": round(rates["same-host, 20000 tensors"] / one_host, 3),
        "registration_vs_one_by_one": round(registration_ratio(5000), 1),
        "tcp_vs_raw_socket": round(one_tcp / socket_gbs, 3),
        "same_host_vs_memcpy": round(one_host / memcpy_gbs, 3),
        "verify_seconds_over_tcp_seconds": round(one_tcp / verify_gbs, 3),
        "idle_agent_core_share": round(idle_share(), 4),
        "socket_gigabytes_per_second": round(socket_gbs, 2),
        "memcpy_gigabytes_per_second": round(memcpy_gbs, 2),
    }
    if as_json:
        json.dump({"bench": "transfer", "figures": figures, "gigabytes_per_second": rates}, sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in figures.items():
            click.echo(f"{name:36} {value}")


if __name__ == "__main__":
    command()
