"""What readers cost an engine that serves: `python -m mxbench.storm.beside_engine`, JSON lines.

A real `vllm serve`, pinned to one core, answers one request after the other; readers on the other core take its weights
again and again, by this project's receiver, with pauses that hold it to READ_BYTES a second. Windows with and without
readers alternate; `tokens_kept` is the median of the ratios of tokens a second. Readers on this host read the engine's
memory by themselves; over TCP its process sends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mxbench.demo import models
from mxbench.demo.workers import Server, Worker
from mxcore.settings import load_settings
from mxcore.transfer.layout import Layout, Placement
from mxcore.transfer.move import Source, SourceClient
from mxcore.transfer.receive import Receiver
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

PAIRS = 3
WINDOW_SECONDS = 12.0
TOKENS = 32
READ_BYTES = 320e6  # a second
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def read(address: str, transport: str) -> None:
    """Takes the weights of the one worker that serves until it is ended; a line of bytes and seconds each time."""
    with ServerClient(address) as client:
        [ref] = client.list_sources(status=p2p_pb2.SOURCE_STATUS_READY)
    source = Source(ref.mx_source_id, ref.worker_id, ref.worker_rank, ref.worker_grpc_endpoint)
    with SourceClient(source, timeout_seconds=60.0) as holder:
        answer = holder.get_layout("")
    layout = Layout.from_proto(answer.layout)
    memory = [np.ones(max(1, size), np.uint8) for size in layout.extent_bytes]
    placement = Placement(tuple(int(each.ctypes.data) for each in memory), (0,) * len(memory), "cpu")
    settings = load_settings({"MX_TRANSPORT": transport}, {})
    while True:
        receiver = Receiver(
            layout,
            placement,
            settings=settings,
            worker_id="bench-reader",
            scalar_names=sorted(scalar.name for scalar in answer.scalars),
            chunk_bytes=answer.chunk_bytes,
        )
        began = time.monotonic()
        report = receiver.receive([source])
        time.sleep(max(0.0, began + report.bytes / READ_BYTES - time.monotonic()))
        sys.stdout.write(f"{report.bytes} {time.monotonic() - began}\n")
        sys.stdout.flush()


def tokens_a_second(worker: Worker, seconds: float) -> float:
    began, made = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        body = {
            "prompt": "Every byte",
            "max_tokens": TOKENS,
            "min_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        made += worker._post("/v1/completions", body)["usage"]["completion_tokens"]
    return made / (time.monotonic() - began)


def measured(worker: Worker, address: str, transport: str, core: int) -> dict[str, Any]:
    alone, beside, read_bytes, read_seconds = [], [], 0, 0.0
    for _ in range(PAIRS):
        alone.append(tokens_a_second(worker, WINDOW_SECONDS))
        command = [sys.executable, "-m", "mxbench.storm.beside_engine", address, transport]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(reader.pid, {core})
        assert reader.stdout is not None
        reader.stdout.readline()  # the first one also imports and connects
        beside.append(tokens_a_second(worker, WINDOW_SECONDS))
        reader.terminate()
        for line in reader.stdout:
            count, seconds = line.split()
            read_bytes, read_seconds = read_bytes + int(count), read_seconds + float(seconds)
        reader.wait()
    return {
        "transport": transport,
        "tokens_per_second_alone": round(median(alone), 2),
        "tokens_per_second_beside": round(median(beside), 2),
        "tokens_kept": round(median(b / a for a, b in zip(alone, beside, strict=True)), 3),
        "readers_mb_per_second": round(read_bytes / read_seconds / 1e6, 1) if read_seconds else 0.0,
    }


def main(arguments: list[str]) -> None:
    if arguments:
        read(*arguments)
        return
    first, *others = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="mx-bench-") as place:
        folder = Path(place)
        model = models.generate(folder / "model", "qwen3", SHAPE)
        os.sched_setaffinity(0, {first})  # whoever is started now takes it over, with all its threads
        server = Server(folder)
        worker = Worker("engine", model, folder, load_format="mx", pooling=False, server=server.start())
        try:
            worker.start()
            os.sched_setaffinity(0, {first, *others})
            tokens_a_second(worker, 2.0)
            for transport in ("auto", "tcp"):
                sys.stdout.write(json.dumps(measured(worker, server.address, transport, others[-1])) + "\n")
                sys.stdout.flush()
        finally:
            worker.child.stop()
            server.child.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
