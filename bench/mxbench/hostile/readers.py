"""Hostile readers of serving workers, by each way that weights are read: how many bytes do they change?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxbench.fleet.certificates import certificates
from mxbench.fleet.fleet import BY_NIXL, Fleet, FleetError
from mxbench.hostile.liars import start
from mxbench.needs import ROOT, why_no_tests

SECONDS = 120.0
BY_TCP, BY_ATTACHING = "tcp,self", "tcp,cma,self"


@dataclass(frozen=True)
class Attacked:
    """What hostile readers changed.

    `bytes_written` through sockets, NIXL over TCP, both with the fleet's certificates, and through what a reader by
    cuda_ipc may map (CUDA has no read-only handles). `strangers_let_in`: without a certificate, where workers have
    them. `left_out`: which of them could not run here, and why.
    """

    bytes_written: int
    strangers_let_in: int
    left_out: str = ""


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
    if left_out := why_no_tests():
        return Attacked(written, let_in, f"its reader by cuda_ipc: {left_out}")
    return Attacked(written + attack_device_memory(), let_in)


def attack(source: dict[str, str], tls: str, environ: dict[str, str], stand_in: str = "") -> dict[str, Any]:
    """What a hostile reader was told, and what it changed as far as it can see. Raises FleetError.

    `stand_in`: the driver by whose name the weights lie on a device.
    """
    names = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "MX_"))}
    task = json.dumps({"source": source, "tls": tls, "stand_in": stand_in})
    ran = subprocess.run(
        [sys.executable, "-m", "mxbench.hostile.hostile_reader", task],
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


def attack_device_memory() -> int:
    """By cuda_ipc, on the driver without a GPU of the tests: the bytes of the weights that changed."""
    with tempfile.TemporaryDirectory() as folder:
        from tests.cuda.stand_in import build

        return _attack_device_memory(str(build(Path(folder))))


def _attack_device_memory(library: str) -> int:
    """Raises FleetError, also where the reader had nothing to map."""
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
            if process.stdin is None or process.stdout is None or not (line := process.stdout.readline()):
                raise FleetError("the worker with device memory did not start")
            found = attack(json.loads(line), BY_ATTACHING, {}, library)
            if not (found["let_in"] and found["mapped_bytes"]):
                raise FleetError(f"the hostile reader mapped nothing: {found}")
            process.stdin.write("changed\n")
            process.stdin.flush()
            return int(json.loads(process.stdout.readline())["changed"])
        finally:
            process.kill()
