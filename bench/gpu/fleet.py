"""Workers with weights on one CUDA device, a server, and what goes wrong: the product's own transfer, end to end.

python -m bench.gpu.fleet [--json]   takes twice to four times --tensors × --tensor-mib of device memory. Each receiver
begins with other bytes than the source's; its digest of all of them, made by the device, is compared with the source's.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from bench.demo.processes import free_port

MIB = 1 << 20
DEADLINE_SECONDS = 120.0


class Worker:
    """A process of bench.gpu.device_worker."""

    def __init__(self, task: dict[str, Any], log: Path) -> None:
        self._log = log
        self.digest = ""  # of what it holds at first
        with log.open("w") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.device_worker", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({"event": "ended", "status": self.popen.wait()})

    def send(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def expect(self, event: str) -> dict[str, Any]:
        """The next line of that event; progress is passed over. Raises ClickException."""
        while True:
            try:
                found = self._lines.get(timeout=DEADLINE_SECONDS)
            except queue.Empty:
                found = {"event": f"nothing for {DEADLINE_SECONDS:g} s"}
            if found["event"] == event:
                return found
            if found["event"] != "progress":
                raise click.ClickException(
                    f"{found} instead of {event!r}; its log ends: {self._log.read_text()[-2000:]}"
                )

    def end(self) -> None:
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        try:
            self.popen.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class Fleet:
    """A server and workers, which `stack` ends."""

    def __init__(self, stack: ExitStack, folder: Path, task: dict[str, Any]) -> None:
        self._stack, self._folder, self._task, self._made = stack, folder, task, 0
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "mxserver", "--host", "127.0.0.1", "--port", str(port), "--store", "memory"]
        log = stack.enter_context((folder / "server.log").open("w"))
        server = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(server.wait)
        stack.callback(server.terminate)

    def add(self, role: str, **settings: str) -> Worker:
        """A worker that is up. Seeds have the same bytes, receivers others."""
        self._made += 1
        task = {
            **self._task,
            "role": role,
            "seed": 1 if role == "seed" else 2,
            "settings": {"MX_SERVER_ADDRESS": self.address, "MX_STALL_TIMEOUT_SECS": "5", **settings},
        }
        worker = Worker(task, self._folder / f"{role}{self._made}.log")
        self._stack.callback(worker.end)
        worker.digest = worker.expect("ready")["digest"]
        return worker


def _received(worker: Worker, right: str) -> dict[str, Any]:
    done = worker.expect("done")
    return {
        "right": done["digest"] == right,
        "gbps": done["bytes"] / done["moving_seconds"] / 1e9,
        **{name: done[name] for name in ("transport", "operation", "holders", "bytes_again", "seconds")},
    }


def _measured(fleet: Fleet, slow: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    source = fleet.add("seed")
    right = source.digest
    first, second = fleet.add("receiver"), fleet.add("receiver")
    first.send("start")
    found["one holder"] = _received(first, right)
    second.send("start")
    found["two holders"] = _received(second, right)
    for worker in (second, first, source):
        worker.end()

    source = fleet.add("seed", MX_SOURCE_RATE_LIMIT=slow)
    victim, other, last = (fleet.add("receiver") for _ in range(3))
    victim.send("start")
    victim.expect("progress")
    victim.popen.kill()
    source.send("digest")
    found["source after a receiver was killed"] = {"right": source.expect("digest")["digest"] == right}
    other.send("start")
    found["from it"] = _received(other, right)
    last.send("start")
    last.expect("progress")
    source.popen.kill()
    found["source killed in the middle"] = _received(last, right)
    return found


@click.command("gpu-fleet")
@click.option("--tensors", default=32, show_default=True, help="Large ones; 59 small ones beside them.")
@click.option("--tensor-mib", default=256.0, show_default=True, help="Of each large one.")
@click.option("--chunk-mib", default=16.0, show_default=True, help="Size of a chunk.")
@click.option(
    "--slow", default="3GB", show_default=True, help="What a source gives a second where something is killed."
)
@click.option("--device", default=0, show_default=True, help="As CUDA counts.")
@click.option("--stand-in", type=click.Path(dir_okay=False), hidden=True, help="The tests' driver without a GPU.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
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
    with tempfile.TemporaryDirectory(prefix="mx-bench-gpu-") as folder, ExitStack() as stack:
        found = _measured(Fleet(stack, Path(folder), task), slow)
    if as_json:
        click.echo(json.dumps({"bench": "gpu-fleet", "stand_in": stand_in is not None, "found": found}))
    else:
        for name, values in found.items():
            click.echo(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}")
    sys.exit(0 if all(values["right"] for values in found.values()) else 1)


if __name__ == "__main__":
    command()
