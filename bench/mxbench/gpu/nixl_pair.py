"""Two processes on one device: one holds bytes, the other READs them by NIXL over cuda_ipc.

python -m mxbench.gpu.nixl_pair DEVICE BYTES [STAND-IN]   is the holder: prints a line of JSON, and ends with its stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from mxcore.cuda import Context, DeviceBuffer, DeviceDigest, context_of
from mxcore.cuda import driver as cuda_driver
from mxcore.nixl import NixlAgent
from mxcore.transfer.route import nixl_device, ucx_settings

TLS = "cuda_ipc,cuda_copy,tcp,self"  # tcp makes the connection
STAND_IN_TLS = "tcp,cma,self"
PIECE_BYTES = 64 * 1024 * 1024
GIVE_UP_SECONDS = 60.0


def load_runtime() -> None:
    """UCX's CUDA module wants libcudart by its name: torch's packages have it, in no folder that is searched."""
    for folder in map(Path, sys.path):
        for library in sorted(folder.glob("nvidia/*/lib/libcudart.so.*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _agent(name: str, buffer: DeviceBuffer) -> NixlAgent:
    if not cuda_driver.is_stand_in():
        load_runtime()
    os.environ["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] = "on"  # else UCX reads so over NVLink alone
    os.environ["UCX_WARN_UNUSED_ENV_VARS"] = "n"  # where there is no CUDA
    with ucx_settings(STAND_IN_TLS if cuda_driver.is_stand_in() else TLS) as told:
        agent = NixlAgent(name, backend_params=told)
    device: dict[str, Any] = nixl_device(buffer.context.index)
    agent.register(array("Q", [buffer.address]), array("Q", [buffer.size_bytes]), **device)
    return agent


def _digest(buffer: DeviceBuffer) -> str:
    made = DeviceDigest(buffer.context)
    try:
        return made.many(array("Q", [buffer.address]), array("Q", [buffer.size_bytes]), array("Q", [0, 1])).hex()
    finally:
        made.close()


def hold() -> None:
    """The holder."""
    index, size_bytes = int(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        cuda_driver._load_stand_in(sys.argv[3])
    buffer = DeviceBuffer(context_of(index), size_bytes)  # whatever lies there: the digest tells it from other bytes
    agent = _agent(f"mx-bench-holder-{os.getpid()}", buffer)
    line = {"metadata": agent.metadata().hex(), "address": buffer.address, "digest": _digest(buffer)}
    print(json.dumps(line), flush=True)
    sys.stdin.read()
    agent.destroy()
    buffer.close()


def read(context: Context, size_bytes: int, rounds: int, stand_in: str | None) -> float:
    """Bytes a second of READs into another buffer of this process, verified. Raises what NIXL raises, ValueError."""
    command = [sys.executable, "-m", "mxbench.gpu.nixl_pair", str(context.index), str(size_bytes)]
    command += [stand_in] if stand_in else []
    buffer = DeviceBuffer(context, size_bytes)
    agent = _agent(f"mx-bench-reader-{os.getpid()}", buffer)
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            text = holder.stdout.readline()
            if not text:
                raise ValueError(f"the holder's process ended with {holder.wait()}")
            line = json.loads(text)
            peer = agent.load_remote(bytes.fromhex(line["metadata"]))
            seconds = min(_once(agent, buffer, line["address"], peer) for _ in range(rounds + 1))
            context.synchronize()
            if _digest(buffer) != line["digest"]:
                raise ValueError("other bytes arrived than the holder has")
            holder.stdin.close()
    finally:
        agent.destroy()
        buffer.close()
    return size_bytes / seconds


def _once(agent: NixlAgent, buffer: DeviceBuffer, remote: int, peer: str) -> float:
    begins = range(0, buffer.size_bytes, PIECE_BYTES)
    device = nixl_device(buffer.context.index)
    kinds: dict[str, Any] = {f"{side}_{name}": value for side in ("local", "remote") for name, value in device.items()}
    transfer = agent.transfer(
        "read",
        array("Q", (buffer.address + begin for begin in begins)),
        array("Q", (remote + begin for begin in begins)),
        array("Q", (min(PIECE_BYTES, buffer.size_bytes - begin) for begin in begins)),
        peer,
        **kinds,
    )
    started = time.perf_counter()
    done = transfer.post()
    while not done:
        if time.perf_counter() - started > GIVE_UP_SECONDS:
            raise ValueError(f"a READ took longer than {GIVE_UP_SECONDS:g} s")
        done = transfer.done()
    seconds = time.perf_counter() - started
    transfer.release()
    return seconds


if __name__ == "__main__":
    hold()
