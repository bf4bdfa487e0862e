"""A worker with weights in device memory, in a process of its own: `mxbench.gpu.fleet` starts it with one JSON object.

Prints a JSON object a line. On `start` it takes the weights from whoever has them and serves them; on `digest` it says
what its memory holds. What the stand-in's device holds is host memory to UCX, hence other transports there.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import sys
import time
from array import array
from typing import Any

import numpy as np

from mxbench.gpu.nixl_pair import STAND_IN_TLS, load_runtime
from mxcore.cuda import DeviceBuffer, DeviceDigest, PinnedBuffer, Stream, context_of, copy_to_device
from mxcore.cuda import driver as cuda_driver
from mxcore.settings import load_settings
from mxcore.transfer.layout import LocalTensor, build_layout
from mxcore.transfer.member import PROTOCOL_VERSION, Membership
from mxcore.transfer.route import UcxPolicy, release_devices
from mxserver.wire import MxError
from mxserver.wire.proto import p2p_pb2

FILL_BYTES = 8 << 20  # of random bytes, repeated over a tensor
SMALL_TENSORS = 60


def say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class DeviceWorker:
    """Large tensors of one size and small ones of odd sizes, each an allocation of its own."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.context = context_of(task["device"])
        self.sizes = [task["tensor_bytes"]] * task["tensors"] + [3001 * k + 7 for k in range(1, SMALL_TENSORS)]
        self.buffers = [DeviceBuffer(self.context, size) for size in self.sizes]
        self.layout, self.placement = build_layout("raw", self._tensors())
        settings = load_settings({"MX_WORKER_GRPC_PORT": 0, "MX_WORKER_HOST": "127.0.0.1"})
        identity = p2p_pb2.SourceIdentity(
            mx_version=PROTOCOL_VERSION,
            model_name="bench/gpu",
            extra_parameters={"layout": "raw", "checkpoint": "1"},
        )
        self.member = Membership(settings, identity, 0, "cuda", chunk_bytes=task["chunk_bytes"])
        self.member.join()
        self._told = 0

    def _tensors(self) -> list[LocalTensor]:
        return [
            LocalTensor(
                f"t{number:04}",
                "torch.uint8",
                (buffer.size_bytes,),
                (1,),
                buffer.address,
                1,
                buffer.address,
                buffer.size_bytes,
                "cuda",
                self.context.index,
            )
            for number, buffer in enumerate(self.buffers)
        ]

    def fill(self, seed: int) -> None:
        stream, pinned = Stream(self.context), PinnedBuffer(self.context, FILL_BYTES)
        for number, buffer in enumerate(self.buffers):
            data = np.random.default_rng([seed, number]).integers(0, 256, FILL_BYTES, np.uint8)
            ctypes.memmove(pinned.address, data.ctypes.data, FILL_BYTES)
            for begin in range(0, buffer.size_bytes, FILL_BYTES):
                size = min(FILL_BYTES, buffer.size_bytes - begin)
                copy_to_device(buffer.address + begin, pinned.address, size, stream)
            stream.synchronize()
        pinned.close()

    def digest(self) -> str:
        """One for all bytes, each tensor's by the device."""
        made = DeviceDigest(self.context)
        addresses = array("Q", [buffer.address for buffer in self.buffers])
        each = made.many(addresses, array("Q", self.sizes), array("Q", range(len(self.sizes) + 1)))
        made.close()
        return hashlib.sha256(each).hexdigest()

    def serve(self, digests: Any = None) -> None:
        self.member.serve(self.layout, self.placement, {}, digests, keep_alive=self.buffers)

    def progress(self, done: int, total: int) -> None:
        if done - self._told > total // 20:
            self._told = done
            say(event="progress", at=time.monotonic(), bytes=done)

    def receive(self) -> None:
        sources = self.member.wait_for_source()
        report = self.member.receive(self.layout, self.placement, {}, sources, self.progress)
        self.serve(report.digests)
        say(
            event="done",
            digest=self.digest(),
            transport=report.transport,
            operation=report.operation,
            bytes=sum(self.sizes),
            seconds=report.seconds,
            moving_seconds=report.moving_seconds,
            holders=len(report.bytes_from),
            bytes_again=report.bytes_again,
        )

    def close(self) -> None:
        self.member.close()
        release_devices()
        for buffer in self.buffers:
            buffer.close()


def main() -> None:
    sys.stdout = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1, which becomes stderr; answers go here
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    task = json.loads(sys.argv[1])
    if task["stand_in"]:
        cuda_driver._load_stand_in(task["stand_in"])
        ctypes.CDLL(task["stand_in"]).mx_stand_in_share(1)
        for name in ("device_fenceable", "serving_device"):
            setattr(UcxPolicy, name, STAND_IN_TLS)
    else:
        load_runtime()
    worker = DeviceWorker(task)
    worker.fill(task["seed"])
    if task["role"] == "seed":
        worker.serve()
    say(event="ready", digest=worker.digest())
    for line in sys.stdin:
        if line.startswith("digest"):
            say(event="digest", digest=worker.digest())
            continue
        try:
            worker.receive()
        except MxError as error:
            say(event="failed", error=str(error)[:1000])
    worker.close()


if __name__ == "__main__":
    main()
