"""The demo's model of 1 GB in an object store behind a slow link: worker A reads it there, worker B takes it from A.

The store and the workers have a network namespace each, with links that the kernel shapes (tc), so this needs root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mxbench.demo import models
from mxbench.demo.processes import Child
from mxbench.demo.workers import Server, Worker
from mxbench.fleet.fleet import FleetError, Network

STORE_MEGABITS = 400.0
WORKER_MEGABITS = 2000.0
NAME = "demo/qwen3-generated-1gb"
STORE_READY_SECONDS = 60.0
STORE, FIRST, SECOND = range(3)  # places in the network


def why_not() -> str:
    """Why links cannot be shaped here; empty if they can, as far as can be told without trying."""
    if os.geteuid() != 0:
        return "it needs root, for network namespaces with shaped links"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} are not installed (Debian's iproute2)" if missing else ""


def run(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Both workers, one after the other; what --json prints. {"left_out": why} where links cannot be shaped.

    Raises DemoError.
    """
    if reason := why_not():
        return {"left_out": reason}
    bucket = folder / "s3" / "models"
    models.qwen3_of_a_gigabyte(bucket / "far")
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network(3, [STORE_MEGABITS, WORKER_MEGABITS, WORKER_MEGABITS]))
        except FleetError as error:
            return {"left_out": f"links cannot be shaped: {error}"}
        store = _store(stack, bucket.parent, folder, network)
        server = Server(folder / "far", host=network.host)
        stack.callback(server.child.stop)
        address = server.start()
        first = _start(stack, "A", FIRST, network, folder, address, store)
        say(f"{NAME}: worker A has read the store in {first.report()['seconds']:.1f} s")
        second = _start(stack, "B", SECOND, network, folder, address, store)
        equal = first.answers() == second.answers()
        say(f"{NAME}: worker B has its weights from A in {second.report()['seconds']:.1f} s")
        rows = [{"worker": name, **worker.report()} for name, worker in (("A", first), ("B", second))]
    return {
        "name": NAME,
        "store_megabits": STORE_MEGABITS,
        "worker_megabits": WORKER_MEGABITS,
        "equal": equal,
        "workers": rows,
        "peer_over_storage": rows[0]["seconds"] / rows[1]["seconds"],
    }


def _store(stack: ExitStack, root: Path, folder: Path, network: Network) -> dict[str, str]:
    """Starts a real S3 server in its namespace; returns the environment of its clients."""
    from mxbench.stand_ins.s3_server import environment

    command = ["-m", "mxbench.stand_ins.s3_server", str(root), network.address(STORE)]
    child = Child("S3 server", command, {}, folder / "logs" / "far-store.log", network.prefix(STORE))
    stack.callback(child.stop)
    child.wait_until(lambda: child.log.read_text().endswith("\n"), STORE_READY_SECONDS)
    return environment(child.log.read_text().split()[-1])


def _start(
    stack: ExitStack, letter: str, place: int, network: Network, folder: Path, server: str, store: dict[str, str]
) -> Worker:
    """One worker in its namespace, ready."""
    home = folder / "far" / f"hub-{letter}"  # nobody finds the other one's files
    shutil.rmtree(home, ignore_errors=True)
    worker = Worker(
        f"far-{letter}",
        NAME,
        folder,
        load_format="mx",
        pooling=False,
        server=server,
        host=network.address(place),
        prefix=network.prefix(place),
        settings={**store, "MX_TRANSPORT": "tcp", "MX_MODEL_URI": "s3://models/far", "HF_HOME": str(home)},
    )
    stack.callback(worker.child.stop)
    worker.start()
    return worker
