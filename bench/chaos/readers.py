"""Hostile readers of serving workers, by each way that weights are read: how many bytes do they change?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.chaos.liars import start
from bench.fleet.certificates import certificates
from bench.fleet.fleet import BY_NIXL, ROOT, Fleet, FleetError

SECONDS = 120.0
BY_TCP, BY_ATTACHING = "tcp,self", "tcp,cma,self"
DEVICE_NOTICED_SECONDS = 60.0  # at the longest


@dataclass(frozen=True)
class Attacked:
    """What hostile readers changed.

    `bytes_written` through sockets, NIXL over TCP, and both with the fleet's certificates. `bytes_by_device_reader`
    through the agent that a reader by cuda_ipc is given (CUDA has no read-only handles), and `noticed_seconds` later
    the holder had found that by itself. `strangers_let_in`: without a certificate, where workers have them.
    """

    bytes_written: int
    strangers_let_in: int
    bytes_by_device_reader: int
    noticed_seconds: float


def attack_all() -> Attacked:
    """One holder after the other, each attacked by a reader in a process of its own. Raises FleetError."""
    written = let_in = 0
    with Fleet(server=False) as fleet, ExitStack() as stack:
        files = certificates(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for transport, tls, environ in (
            ("tcp", "", {}),
            ("auto", BY_TCP, {}),
            (BY_NIXL, BY_TCP, {}),
            ("tcp", "", files),
            (BY_NIXL, BY_TCP, files),
        ):
            holder = start(fleet, transport, environ, role="seed", looks=False)  # it would end what it finds
            source = holder.expect("serving")["source"]
            found = attack(source, tls, environ)
            if not found["let_in"]:
                raise FleetError(f"the hostile reader never got a lease; the holder's log ends: {holder.tail()}")
            if environ:
                let_in += attack(source, tls, {})["let_in"]
            holder.send("changed")
            written += holder.expect("changed")["bytes"]
            holder.end()
    by_device, noticed_seconds = attack_device_memory()
    return Attacked(written, let_in, by_device, noticed_seconds)


def attack(source: dict[str, str], tls: str, environ: dict[str, str], stand_in: str = "") -> dict[str, Any]:
    """What a hostile reader was told, and what it changed as far as it can see. Raises FleetError.

    `stand_in`: the driver by whose name the weights lie on a device.
    """
    names = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "MX_"))}
    task = json.dumps({"source": source, "tls": tls, "stand_in": stand_in})
    ran = subprocess.run(
        [sys.executable, "-m", "bench.chaos.hostile_reader", task],
        cwd=ROOT,
        env={**names, "UCX_NET_DEVICES": "lo", **environ},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if ran.returncode != 0:
        raise FleetError(f"the hostile reader ended with {ran.returncode}: {ran.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def attack_device_memory() -> tuple[int, float]:
    """By cuda_ipc, on the driver without a GPU of the tests: the bytes changed, and after how long that was noticed."""
    with tempfile.TemporaryDirectory() as folder:
        from tests.cuda.stand_in import build

        return _attack_device_memory(str(build(Path(folder))))


def _attack_device_memory(library: str) -> tuple[int, float]:
    with _device_holder(library) as source:
        began = time.monotonic()
        found = attack(source, BY_ATTACHING, {}, library)
        if not found["changed"]:
            return 0, 0.0
        with grpc.insecure_channel(source["endpoint"]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
                if time.monotonic() > began + DEVICE_NOTICED_SECONDS:
                    raise FleetError("a worker did not notice that its device memory was changed")
                time.sleep(0.02)
        return found["changed"], time.monotonic() - began


@contextmanager
def _device_holder(library: str) -> Iterator[dict[str, str]]:
    """A worker whose weights lie on a device of the stand-in."""
    task = {"library": library, "mode": "serve", "share": True, "tls": BY_ATTACHING}
    names = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "MX_"))}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cuda.holder", json.dumps(task)],
        cwd=ROOT,
        env={**names, "UCX_NET_DEVICES": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if process.stdout is None or not (line := process.stdout.readline()):
                raise FleetError("the worker with device memory did not start")
            yield json.loads(line)
        finally:
            process.kill()
