"""One load from S3 into memory, in a process of its own: `python -m mxbench.object_store.candidates NAME URI`.

Prints one JSON object: seconds of the load, from the listing to the last byte, CPU seconds of this process meanwhile,
and a digest of each tensor, made afterwards. Importing and starting the process do not count; first connections do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mxcore.digest import xxh3_64

THREADS = 8
PART_BYTES = 8 * 1024 * 1024


def ours(uri: str) -> dict[str, torch.Tensor]:
    """Every tensor's bytes straight into its place: one buffer, one submission."""
    from mxcore.memory import HostBuffer
    from mxcore.storage.checkpoint import TensorViews
    from mxcore.storage.remote import ObjectFolder, RemoteRange, open_remote, parse_model_uri

    folder = ObjectFolder(parse_model_uri(uri))
    checkpoint = open_remote(folder)
    buffer = HostBuffer(checkpoint.total_bytes + 64 * len(checkpoint))
    ranges, begins, at = [], {}, 0
    for name, info in checkpoint.tensors.items():
        begins[name] = at
        ranges.append(RemoteRange(str(checkpoint.files[info.file]), info.offset, info.size_bytes, buffer.address + at))
        at += -(-info.size_bytes // 64) * 64
    folder.read_into(ranges)
    folder.close()
    views = TensorViews(buffer, "torch")
    made = {name: views.tensor(info, begins[name]) for name, info in checkpoint.tensors.items()}
    buffer.close_after_exports()
    return made


def ours_stream(uri: str) -> dict[str, torch.Tensor]:
    """Loads as the plugin does: through the ring, each tensor copied to its final place."""
    from mxcore.storage.remote import ObjectFolder, open_remote, parse_model_uri, stream_remote

    folder = ObjectFolder(parse_model_uri(uri))
    made = {name: tensor.clone() for name, tensor in stream_remote(folder, open_remote(folder))}
    folder.close()
    return made


def runai(uri: str) -> dict[str, torch.Tensor]:
    """Run:ai's streamer alone, as its own documentation uses it."""
    from runai_model_streamer import SafetensorsStreamer, list_safetensors

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(sorted(list_safetensors(uri)))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def boto3(uri: str) -> dict[str, torch.Tensor]:
    """Ranged GETs of boto3 by some threads, then tensors on those bytes."""
    import boto3 as client_library
    from botocore.config import Config
    from safetensors.torch import load

    client = client_library.client("s3", config=Config(s3={"addressing_style": "path"}, max_pool_connections=THREADS))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    weights = [item for item in found if item["Key"].endswith(".safetensors")]
    files = {item["Key"]: bytearray(item["Size"]) for item in weights}

    def part(key: str, begin: int) -> None:
        end = min(begin + PART_BYTES, len(files[key]))
        body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}")["Body"]
        files[key][begin:end] = body.read()

    with ThreadPoolExecutor(THREADS) as pool:
        parts = [(key, begin) for key, data in files.items() for begin in range(0, len(data), PART_BYTES)]
        list(pool.map(lambda one: part(*one), parts))
    made: dict[str, torch.Tensor] = {}
    for data in files.values():
        made |= load(bytes(data))
    return made


CANDIDATES: dict[str, Callable[[str], dict[str, torch.Tensor]]] = {
    "ours": ours,
    "ours_stream": ours_stream,
    "runai": runai,
    "boto3": boto3,
}


def _prepare(name: str) -> None:
    """What a process that loads has imported already."""
    import obstore  # noqa: F401
    import runai_model_streamer  # noqa: F401

    if name == "boto3":
        import boto3  # noqa: F401


def main() -> None:
    """Runs the candidate of the command line once."""
    name, uri = sys.argv[1:3]
    _prepare(name)
    started, burnt = time.perf_counter(), time.process_time()
    tensors: Any = CANDIDATES[name](uri)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - burnt
    digests = {key: xxh3_64(t.contiguous().view(torch.uint8).numpy()) for key, t in tensors.items()}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "digests": digests}))


if __name__ == "__main__":
    main()
