"""`mx bench files`: model files from the server over gRPC, against a gRPC stream that does nothing else.

Server and client are processes of their own on this machine. The bare stream sends one 1 MiB buffer again and again,
under our channel options, under gRPC's own, and with wide windows, and the client drops it: the best is the limit.
Ours reads files, sends them with ModelService.StreamModelFiles, and the client checks every file's digest: once
dropping the bytes, once writing them to a folder. All are taken in turns, best of the rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import click
import grpc

from mxserver.wire.calls import channel_options
from mxserver.wire.files import FileSource, ModelClient, PortState, provider_of
from mxserver.wire.proto import model_pb2

MIB = 1024 * 1024
BARE = "/mx.bench.Bare/Stream"
WIDE = [*channel_options(), ("grpc.http2.lookahead_bytes", 64 * MIB), ("grpc.http2.max_frame_size", 16 * MIB - 1)]
PLAIN = [("grpc.max_receive_message_length", 100 * MIB), ("grpc.max_send_message_length", 100 * MIB)]
Options = list[tuple[str, int]]


def bare_server(pipe: Connection, options: Options) -> None:
    """Streams the requested number of MiB, in messages of 1 MiB."""
    data = os.urandom(MIB)

    def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield data

    handler = grpc.method_handlers_generic_handler(
        "mx.bench.Bare", {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
    server.add_generic_rpc_handlers((handler,))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    threading.Event().wait()


@contextmanager
def bare(options: Options) -> Iterator[str]:
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=bare_server, args=(far, options), daemon=True)
    process.start()
    yield f"127.0.0.1:{near.recv()}"
    process.kill()
    process.join()


def in_parallel(streams: int, run: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bare_rate(address: str, options: Options, streams: int, total_bytes: int) -> float:
    """GB/s of bare streams that send so many bytes together."""

    def run(_: int) -> None:
        with grpc.insecure_channel(address, options=[*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
            for _ in channel.unary_stream(BARE)(str(total_bytes // streams // MIB).encode()):
                pass

    started = time.perf_counter()
    in_parallel(streams, run)
    return total_bytes / (time.perf_counter() - started) / 1e9


def received_rate(address: str, name: str, files: list[tuple[str, int, str]], streams: int) -> float:
    """GB/s of our stream, every file's digest checked, nothing written."""
    import xxhash

    with ModelClient(address) as client:
        place = client.list_files(name).place
        request = model_pb2.ModelFilesRequest(model_name=name, provider=provider_of(name))

        def run(number: int) -> None:
            with FileSource(address, None, request, place, PortState(address)) as source:
                for path, size_bytes, digest in files[number::streams]:
                    hasher = xxhash.xxh3_64()
                    for piece in source.blocks(path, 0, size_bytes, digest):
                        hasher.update(piece.data)
                    if f"xxh3-64:{hasher.hexdigest()}" != digest:
                        raise click.ClickException(f"{path} came with other bytes")

        started = time.perf_counter()
        in_parallel(streams, run)
        return sum(size for _, size, _ in files) / (time.perf_counter() - started) / 1e9


@contextmanager
def server(cache: Path, source: Path) -> Iterator[tuple[str, int]]:
    """`mxserver` over a cache folder: its address and process id."""
    environ = {
        **os.environ,
        "MODEL_EXPRESS_CACHE_DIRECTORY": str(cache),
        "MX_FILE_SOURCES": str(source.parent),
        "MX_METADATA_BACKEND": "memory",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mxserver", "--host", "127.0.0.1", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    assert process.stderr is not None
    port = next(line.split(" store=")[0].rpartition(":")[2] for line in process.stderr if "listening on " in line)
    drained = threading.Thread(target=process.stderr.read, daemon=True)
    drained.start()
    yield f"127.0.0.1:{port}", process.pid
    process.send_signal(signal.SIGTERM)
    process.wait()
    drained.join()


def peak_bytes(pid: int) -> int:
    """The peak memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def resent_after_cut(address: str, name: str, folder: Path, total_bytes: int) -> tuple[float, float]:
    """A fetch whose connection is cut in the middle: chunks (of 1 MiB) that the client got twice, and MiB that
    crossed the network twice, including bytes in buffers at the cut. A proxy counts the latter; a fetch without a cut
    is subtracted, so that heads of answers do not count.
    """
    from tests.models.tcp_proxy import TcpProxy

    with ModelClient(address) as asking:
        place = asking.list_files(name).place
    port = place.port if place else 0
    passed = []
    chunks = 0.0
    for cut in (False, True):
        with TcpProxy(f"127.0.0.1:{port}") as proxy, ModelClient(address, files_port=proxy.port) as client:
            if cut:
                proxy.cut_after(total_bytes // 2)
            report = client.fetch(name, folder / f"cut-{cut}", streams=1)
            if cut and not report.breaks:
                raise click.ClickException("the cut did not happen")
            chunks = (report.bytes_received - total_bytes) / MIB
            passed.append(proxy.answered_bytes)
        shutil.rmtree(folder / f"cut-{cut}")
    return chunks, max(0.0, (passed[1] - passed[0]) / MIB)


def measure(total_bytes: int, rounds: int) -> dict[str, float]:
    ram = Path("/dev/shm")  # noqa: S108 - memory, so that no disk is measured
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as scratch:
        source, cache, to = (Path(scratch, name) for name in ("model", "cache", "to"))
        source.mkdir()
        block = os.urandom(16 * MIB)
        for number in range(4):
            with (source / f"model-{number}.safetensors").open("wb") as made:
                for _ in range(total_bytes // 4 // len(block)):
                    made.write(block)
        name = f"file://{source}"
        with (
            server(cache, source) as (address, pid),
            bare(channel_options()) as tuned,
            bare(PLAIN) as plain,
            bare(WIDE) as wide,
        ):
            with ModelClient(address) as client:
                client.ensure(name)
                shutil.rmtree(source)
                figures = _measured(
                    client, name, to, {tuned: channel_options(), plain: PLAIN, wide: WIDE}, total_bytes, rounds
                )
            figures["server_peak_mib"] = peak_bytes(pid) / MIB
    return figures


def _measured(
    client: ModelClient, name: str, to: Path, bares: dict[str, Options], total_bytes: int, rounds: int
) -> dict[str, float]:
    files = [tuple(info) for info in client.list_files(name).files]
    best: dict[str, float] = {}

    def note(figure: str, rate: float) -> None:
        best[figure] = max(best.get(figure, 0.0), rate)

    for _ in range(rounds):
        for streams in (1, 4):
            for address, options in bares.items():
                note(f"grpc_gb_s_{streams}", bare_rate(address, options, streams, total_bytes))
            note(f"stream_gb_s_{streams}", received_rate(client.address, name, files, streams))
            report = client.fetch(name, to, streams=streams)
            note(f"to_folder_gb_s_{streams}", total_bytes / report.seconds / 1e9)
            shutil.rmtree(to)
    for streams in (1, 4):
        best[f"vs_grpc_limit_{streams}"] = best[f"stream_gb_s_{streams}"] / best[f"grpc_gb_s_{streams}"]
        best[f"to_folder_vs_grpc_{streams}"] = best[f"to_folder_gb_s_{streams}"] / best[f"grpc_gb_s_{streams}"]
    best["vs_grpc_limit"] = min(best["vs_grpc_limit_1"], best["vs_grpc_limit_4"])
    chunks, in_flight = resent_after_cut(client.address, name, to, total_bytes)
    best["resent_chunks_after_cut"], best["lost_in_flight_mib"] = chunks, in_flight
    best["client_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return best


@click.command()
@click.option("--mib", default=1024, show_default=True, help="Size of the model.")
@click.option("--rounds", default=8, show_default=True, help="Rounds; the best of each counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(mib: int, rounds: int, as_json: bool) -> None:
    """Model files from the server, against the best bare gRPC stream of the same run."""
    figures = {name: round(value, 3) for name, value in measure(mib * MIB, rounds).items()}
    if as_json:
        click.echo(json.dumps({"bench": "files", "mib": mib, "rounds": rounds, "figures": figures}, indent=1))
        return
    for name, value in figures.items():
        click.echo(f"{name:28} {value:10.3f}")
