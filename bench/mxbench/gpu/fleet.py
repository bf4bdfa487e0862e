"""Workers with weights on one CUDA device, a server, and what goes wrong: the product's own transfer, end to end.

python -m mxbench.gpu.fleet [--json]   takes twice to four times --tensors × --tensor-mib of device memory. A receiver
begins with other bytes than the source's; its digest of all of them, made by the device, is compared with the source's.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from mxbench.fleet.fleet import Fleet, FleetError, Process
from mxbench.results import json_option

MIB = 1 << 20


class Workers:
    """Processes of mxbench.gpu.device_worker in a fleet."""

    def __init__(self, fleet: Fleet, task: dict[str, Any]) -> None:
        self._fleet, self._task = fleet, task

    def add(self, role: str, **settings: str) -> tuple[Process, str]:
        """One that is up, and the digest of what it holds. Seeds have the same bytes, receivers others."""
        task = {**self._task, "role": role, "seed": 1 if role == "seed" else 2}
        process = self._fleet.add(
            task,
            transport="auto",
            environ={"MX_STALL_TIMEOUT_SECS": "5", **settings},
            module="mxbench.gpu.device_worker",
        )
        return process, process.expect("ready")["digest"]


def _received(worker: Process, right: str) -> dict[str, Any]:
    done = worker.expect("done")
    return {
        "right": done["digest"] == right,
        "gbps": done["bytes"] / done["moving_seconds"] / 1e9,
        **{name: done[name] for name in ("transport", "operation", "holders", "bytes_again", "seconds")},
    }


def _measured(workers: Workers, slow: str, total_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    source, right = workers.add("seed")
    first, second = (workers.add("receiver")[0] for _ in range(2))
    first.send("start")
    found["one holder"] = _received(first, right)
    second.send("start")
    found["two holders"] = _received(second, right)
    for worker in (second, first, source):
        worker.leave()

    source, _ = workers.add("seed", MX_SOURCE_RATE_LIMIT=slow)
    victim, last = (workers.add("receiver")[0] for _ in range(2))
    other, _ = workers.add("receiver", MX_SOURCE_RATE_LIMIT=slow)  # as slow: both give, until one of them dies
    victim.send("start")
    victim.until(1)
    victim.end()
    source.send("digest")
    found["source after a receiver was killed"] = {"right": source.expect("digest")["digest"] == right}
    other.send("start")
    found["from it"] = _received(other, right)
    last.send("start")
    last.until(0.75 * total_bytes)
    source.end()
    found["source killed in the middle"] = _received(last, right)
    return found


@click.command("gpu-fleet")
@click.option(
    "--tensors", type=click.IntRange(1), default=32, show_default=True, help="Large ones; 59 small ones beside them."
)
@click.option(
    "--tensor-mib", type=click.FloatRange(0, min_open=True), default=256.0, show_default=True, help="Of each large one."
)
@click.option(
    "--chunk-mib", type=click.FloatRange(0, min_open=True), default=16.0, show_default=True, help="Size of a chunk."
)
@click.option(
    "--slow", default="3GB", show_default=True, help="What a source gives a second where something is killed."
)
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="As CUDA counts.")
@click.option("--stand-in", type=click.Path(dir_okay=False), hidden=True, help="The tests' driver without a GPU.")
@json_option
def command(
    tensors: int, tensor_mib: float, chunk_mib: float, slow: str, device: int, stand_in: str | None, as_json: bool
) -> None:
    """Weights from device memory to device memory by the product's transfer, kills in both roles included."""
    task = {
        "device": device,
        "tensors": tensors,
        "tensor_bytes": int(tensor_mib * MIB),
        "chunk_bytes": int(chunk_mib * MIB),
        "stand_in": stand_in,
    }
    try:
        with Fleet() as fleet:
            found = _measured(Workers(fleet, task), slow, tensors * int(tensor_mib * MIB))
    except FleetError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"bench": "gpu-fleet", "stand_in": stand_in is not None, "found": found}))
    else:
        for name, values in found.items():
            click.echo(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}")
    sys.exit(0 if all(values["right"] for values in found.values()) else 1)


if __name__ == "__main__":
    command()
