"""`mx bench files`: model files from the server's port for files, against bare servers that do nothing else.

Server and client are processes of their own on this machine; the files lie in memory (tmpfs). The limit of plain is
the standard library's HTTP server with sendfile, whose client reads into the same memory and checks nothing; that of
TLS a pair of TLS sockets, whose server sends one block again and again. Ours checks every digest: of whole files
(`files`: into one block, as `mx models get` before it writes), and of parts (`parts`: into memory, as workers load). A
round takes all of them in turns; a ratio is the median over the rounds of ours by the limit of the same round. Parts
are taken once before the rounds, which is when the server makes their digests.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import click
import xxhash

from mxbench.files.bare import bare_http, bare_tls, take_http, take_tls
from mxbench.files.server import running_server
from mxbench.results import document, json_option, mib_option, rounds_option
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files import FileInfo, FileSource, ModelClient, PortState, provider_of
from mxserver.wire.proto import model_pb2

MIB = 1024 * 1024
STREAMS = (1, 4)
SMALL_ROUNDS = 3  # at most, of many small files: seconds each
SMALL_BYTES = 2000
SLOW_SHARE = 4  # over gRPC and from a hub, a file takes 10 ms and more: a quarter of the small files shows as much


class Took(NamedTuple):
    """One run: seconds by the clock, and of both ends' processors."""

    seconds: float
    cpu_seconds: float


def timed(pid: int, run: Callable[[], None]) -> Took:
    """`pid`: the server's process."""
    cpu, started = cpu_seconds(pid), time.perf_counter()
    run()
    return Took(time.perf_counter() - started, cpu_seconds(pid) - cpu)


def cpu_seconds(pid: int) -> float:
    """What this process and that one have used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") + sum(os.times()[:2])


def in_parallel(streams: int, run: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


class Ours:
    """One server's model, taken by our client."""

    def __init__(self, client: ModelClient, credentials: ClientCredentials | None, name: str) -> None:
        self.client = client
        self._credentials = credentials
        self.name = name
        listed = client.list_files(name)
        self.files, self._place, self._revision = listed.files, listed.place, listed.revision
        self.pid = 0

    def take_files(self, files: list[FileInfo]) -> None:
        """Whole files over one connection, each digest checked, the bytes dropped."""
        request = model_pb2.ModelFilesRequest(model_name=self.name, provider=provider_of(self.name))
        state = PortState(self.client.address)
        with FileSource(self.client.address, self._credentials, request, self._place, state) as source:
            for info in files:
                hasher = xxhash.xxh3_64()
                if info.size:
                    for piece in source.blocks(info.path, 0, info.size, info.digest):
                        hasher.update(piece.data)
                if f"xxh3-64:{hasher.hexdigest()}" != info.digest:
                    raise click.ClickException(f"{info.path} came with other bytes")
        if state.is_closed:
            raise click.ClickException("the port for files was not used")

    def take_parts(self, files: list[FileInfo], into: memoryview) -> None:
        """Parts over one connection into memory, each digest checked."""
        with self.client.reader(self.name, revision=self._revision, place=self._place) as reader:
            at = 0
            for info in files:
                reader.read_into(info.path, 0, into[at : at + info.size])
                at += info.size
            if reader.bytes_unverified:
                raise click.ClickException("bytes came without digests")


class Listed(NamedTuple):
    """A model of many small files."""

    name: str
    files: int


def resent_after_cut(client: ModelClient, name: str, folder: Path, total_bytes: int) -> tuple[float, float]:
    """A fetch whose connection is cut in the middle: chunks (of 1 MiB) that the client got twice, and MiB that crossed
    the network twice, including bytes in buffers at the cut. A proxy counts the latter; a fetch without a cut is
    subtracted, so that heads of answers do not count.
    """
    from mxbench.stand_ins.tcp_proxy import TcpProxy

    place = client.list_files(name).place
    port = place.port if place else 0
    passed = []
    chunks = 0.0
    for cut in (False, True):
        with TcpProxy(f"127.0.0.1:{port}") as proxy, ModelClient(client.address, files_port=proxy.port) as through:
            if cut:
                proxy.cut_after(total_bytes // 2)
            report = through.fetch(name, folder / f"cut-{cut}", streams=1)
            if cut and not report.breaks:
                raise click.ClickException("the cut did not happen")
            chunks = (report.bytes_received - total_bytes) / MIB
            passed.append(proxy.answered_bytes)
        shutil.rmtree(folder / f"cut-{cut}")
    return chunks, max(0.0, (passed[1] - passed[0]) / MIB)


def many_files(address: str, small: Listed, few: Listed, scratch: Path) -> dict[str, float]:
    """The ways that have no bare limit, once each: files a second by the remote reader; over gRPC and from the hub,
    which are slow, as many as `few` has.
    """
    from mxbench.stand_ins.hub import hub_stand_in
    from mxcore.storage.remote import ServerFolder, pull_small_files

    figures = {}

    def rate(what: str, count: int, run: Callable[[], object]) -> None:
        started = time.perf_counter()
        run()
        figures[f"small_{what}_a_second"] = count / (time.perf_counter() - started)
        if sum(path.suffix == ".json" for path in (scratch / what).rglob("*")) != count:
            raise click.ClickException(f"{what}: files are missing")
        shutil.rmtree(scratch / what)

    with ModelClient(address, files_port=0) as client:
        rate("by_grpc", few.files, lambda: client.fetch(few.name, scratch / "by_grpc"))
    with ModelClient(address) as client:
        folder = ServerFolder(client, small.name, client.list_files(small.name))
        rate("by_remote_reader", small.files, lambda: pull_small_files(folder, scratch / "by_remote_reader"))
        folder.close()
    with hub_stand_in() as hub:
        hub.add("bench/small", {f"{number // 1000}/{number}.json": b"%d" % number for number in range(few.files)})
        environ = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        with (
            running_server(scratch / "from_hub", scratch, environ=environ) as (port, _),
            ModelClient(f"127.0.0.1:{port}") as client,
        ):
            started = time.perf_counter()
            client.ensure("bench/small")
            figures["small_from_hub_a_second"] = few.files / (time.perf_counter() - started)
            if len(client.list_files("bench/small").files) != few.files:
                raise click.ClickException("from the hub: files are missing")
    shutil.rmtree(scratch / "from_hub")
    return figures


class Bench:
    """All runs of one `mx bench files`, over a scratch folder in memory."""

    def __init__(self, scratch: Path, stack: ExitStack, total_bytes: int, small_files: int) -> None:
        from mxbench.stand_ins.authority import Authority

        self.scratch = scratch
        self.total_bytes = total_bytes
        self.small_files = small_files
        large, small, few = (scratch / "models" / name for name in ("large", "small", "few"))
        made_files(large, {small: small_files, few: -(-small_files // SLOW_SHARE)}, total_bytes)
        self.large_files = sorted(large.iterdir())
        self.into = memoryview(bytearray(total_bytes))
        self.into[:: resource.getpagesize()] = bytes(len(self.into[:: resource.getpagesize()]))  # touched
        authority = Authority(scratch)
        cert, key = authority.issue("server", "localhost")
        self.ca_file = authority.ca_file
        self.http_port, self.http_pid = stack.enter_context(bare_http())
        self.tls_port, self.tls_pid = stack.enter_context(bare_tls(cert, key))
        trusted = ClientCredentials(ca_file=authority.ca_file)
        cache = scratch / "cache"
        self.ours = {}
        for scheme, flags in (("http", ()), ("https", ("--tls-cert", str(cert), "--tls-key", str(key)))):
            port, pid = stack.enter_context(running_server(cache, large.parent, *flags))
            credentials = trusted if scheme == "https" else None
            address = f"https://localhost:{port}" if scheme == "https" else f"127.0.0.1:{port}"
            client = stack.enter_context(ModelClient(address, credentials=credentials))
            for folder in (large, small, few):
                client.ensure(f"file://{folder}")
            self.ours[scheme] = Ours(client, credentials, f"file://{large}")
            self.ours[scheme].pid = pid
        self.small = Ours(self.ours["http"].client, None, f"file://{small}")
        self.small.pid = self.ours["http"].pid
        self.few = Listed(f"file://{few}", -(-small_files // SLOW_SHARE))
        self.small_paths = sorted(path for path in small.rglob("*") if path.is_file())

    def parts_of_memory(self, streams: int) -> list[memoryview]:
        step = self.total_bytes // streams
        return [self.into[number * step : (number + 1) * step] for number in range(streams)]

    def round(self, streams: int) -> dict[str, Took]:
        """One run each, the limits between ours."""
        http, https = self.ours["http"], self.ours["https"]
        room = self.parts_of_memory(streams)
        share = self.total_bytes // streams

        def on(pid: int, run: Callable[[int], None]) -> Took:
            return timed(pid, lambda: in_parallel(streams, run))

        def mine(own: Ours, number: int) -> list[FileInfo]:
            return list(own.files[number::streams])

        return {
            "sendfile": on(self.http_pid, lambda n: take_http(self.http_port, self.large_files[n::streams], None)),
            "files": on(http.pid, lambda n: http.take_files(mine(http, n))),
            "sendfile_into": on(
                self.http_pid, lambda n: take_http(self.http_port, self.large_files[n::streams], room[n])
            ),
            "parts": on(http.pid, lambda n: http.take_parts(mine(http, n), room[n])),
            "ssl_pair": on(self.tls_pid, lambda n: take_tls(self.tls_port, self.ca_file, share, None)),
            "tls_files": on(https.pid, lambda n: https.take_files(mine(https, n))),
            "ssl_pair_into": on(self.tls_pid, lambda n: take_tls(self.tls_port, self.ca_file, share, room[n])),
            "tls_parts": on(https.pid, lambda n: https.take_parts(mine(https, n), room[n])),
        }

    def small_round(self) -> tuple[Took, Took, float]:
        """Many small files over four connections: bare, ours, and seconds of a fetch into a folder."""
        bare = timed(
            self.http_pid, lambda: in_parallel(4, lambda n: take_http(self.http_port, self.small_paths[n::4], None))
        )
        ours = timed(
            self.small.pid, lambda: in_parallel(4, lambda n: self.small.take_files(list(self.small.files[n::4])))
        )
        report = self.small.client.fetch(self.small.name, self.scratch / "to")
        shutil.rmtree(self.scratch / "to")
        return bare, ours, report.seconds


def made_files(large: Path, small: dict[Path, int], total_bytes: int) -> None:
    """`small`: folders, and how many small files each has."""
    block = os.urandom(16 * MIB)
    large.mkdir(parents=True)
    for number in range(4):
        with (large / f"model-{number}.safetensors").open("wb") as made:
            for _ in range(total_bytes // 4 // len(block)):
                made.write(block)
    for folder, count in small.items():
        for number in range(count):
            file = folder / f"{number // 1000}" / f"{number}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(block[number : number + SMALL_BYTES])


RATIOS = {
    "vs_sendfile_files": ("sendfile", "files"),
    "vs_sendfile_parts": ("sendfile_into", "parts"),
    "tls_vs_ssl_pair_files": ("ssl_pair", "tls_files"),
    "tls_vs_ssl_pair_parts": ("ssl_pair_into", "tls_parts"),
}


def measure(total_bytes: int, rounds: int, small_files: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures, and of those that are medians each round's value."""
    ram = Path("/dev/shm")  # noqa: S108 - memory, so that no disk is measured
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as scratch, ExitStack() as stack:
        bench = Bench(Path(scratch), stack, total_bytes, small_files)
        for streams in STREAMS:
            bench.round(streams)  # once unmeasured: connections, imports, digests of parts
        taken: dict[int, list[dict[str, Took]]] = {streams: [] for streams in STREAMS}
        small: list[tuple[Took, Took, float]] = []
        for _ in range(rounds):
            for streams in STREAMS:
                taken[streams].append(bench.round(streams))
            if len(small) < SMALL_ROUNDS:
                small.append(bench.small_round())
        samples = {
            name: values
            for streams, runs in taken.items()
            for name, values in of_streams(streams, runs, total_bytes).items()
        }
        samples["small_files_a_second"] = [small_files / ours.seconds for _, ours, _ in small]
        samples["small_vs_sendfile"] = [bare.seconds / ours.seconds for bare, ours, _ in small]
        samples["small_cpu_vs_sendfile"] = [bare.cpu_seconds / ours.cpu_seconds for bare, ours, _ in small]
        samples["small_to_folder_a_second"] = [small_files / seconds for _, _, seconds in small]
        figures = {name: statistics.median(values) for name, values in samples.items()}
        for name in ("vs_sendfile", "tls_vs_ssl_pair"):
            figures[name] = min(value for key, value in figures.items() if key.startswith(f"{name}_"))
        figures |= many_files(
            bench.small.client.address, Listed(bench.small.name, small_files), bench.few, bench.scratch
        )
        chunks, in_flight = resent_after_cut(
            bench.ours["http"].client, bench.ours["http"].name, bench.scratch, total_bytes
        )
        figures["resent_chunks_after_cut"], figures["lost_in_flight_mib"] = chunks, in_flight
        figures["client_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures["server_peak_mib"] = peak_mib(bench.ours["http"].pid)
    return figures, samples


def of_streams(streams: int, runs: list[dict[str, Took]], total_bytes: int) -> dict[str, list[float]]:
    """Rates and ratios of each round; `cpu_` ratios are of both ends' processor time, which others' load moves less."""
    samples = {}
    for name in runs[0]:
        samples[f"{name}_gb_s_{streams}"] = [total_bytes / run[name].seconds / 1e9 for run in runs]
        samples[f"{name}_cpu_s_a_gb_{streams}"] = [run[name].cpu_seconds / total_bytes * 1e9 for run in runs]
    for name, (limit, ours) in RATIOS.items():
        samples[f"{name}_{streams}"] = [run[limit].seconds / run[ours].seconds for run in runs]
        samples[f"cpu_{name}_{streams}"] = [run[limit].cpu_seconds / run[ours].cpu_seconds for run in runs]
    return samples


def peak_mib(pid: int) -> float:
    """The peak memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@click.command()
@mib_option(1024, "Size of the model of large files.", least=64)
@rounds_option(8, "Rounds; medians count.")
@click.option(
    "--small-files", type=click.IntRange(1), default=10_000, show_default=True, help="Files of the model of small ones."
)
@json_option
def command(mib: int, rounds: int, small_files: int, as_json: bool) -> None:
    """Model files from the server by HTTP, plain and TLS, against bare servers in the same rounds."""
    measured, samples = measure(mib * MIB, rounds, small_files)
    figures = {name: round(value, 3) for name, value in measured.items()}
    if as_json:
        asked = {"mib": mib, "rounds": rounds, "small_files": small_files}
        click.echo(json.dumps(document("files", figures, settings=asked, samples=samples, **asked), indent=1))
        return
    for name, value in figures.items():
        click.echo(f"{name:32} {value:10.3f}")
