"""Strangers on a worker's ports while it serves: what they make its process hold, and whether its reader is right."""

from __future__ import annotations

import random
import re
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from mxbench.fleet.fleet import Fleet, FleetError
from mxbench.hostile.liars import receive, start
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2, p2p_pb2_grpc

MODEL_BYTES = 24 << 20
HUGE_BYTES = 48 << 20
ALLOWED_BYTES = 200 << 10  # a message that no limit refuses unread
LEASES = 4  # at a time: all strangers of this host are one, and so is its reader
SILENT = 96  # connections to the chunk port at a time
SAMPLE_SECONDS = 0.02
CALL_SECONDS = 10.0
RECEIVES = 5  # at a time, while strangers call
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Beset:
    """`calls` and connections of strangers, `growth_mib` of the worker's resident memory, its reader's `receives`."""

    calls: int
    growth_mib: float
    receives: int
    wrong: int


class _Strangers:
    """Callers without a lease of their own; each kind goes on in a thread until `over`."""

    def __init__(self, source: dict[str, str], stack: ExitStack) -> None:
        self.source = source
        self.over = threading.Event()
        self.calls = 0
        self._host, _, port = source["endpoint"].rpartition(":")
        self._grpc_port = int(port)
        channel = stack.enter_context(grpc.insecure_channel(source["endpoint"], options=OPTIONS))
        self._worker = p2p_pb2_grpc.WorkerServiceStub(channel)
        self._transfer = mx_pb2_grpc.TransferServiceStub(channel)
        asked = mx_pb2.GetLayoutRequest(mx_source_id=source["source_id"], worker_id=source["worker_id"])
        layout = self._transfer.GetLayout(asked, timeout=CALL_SECONDS)
        self._chunk_port = layout.transport.chunk_port
        self._fingerprint = layout.fingerprint
        self._huge = bytes(HUGE_BYTES)
        self._leases: deque[str] = deque()
        self._silent: deque[socket.socket] = deque()

    def kinds(self) -> list[Callable[[], None]]:
        """What they do."""
        return [self.huge_sets, self.huge_metadata, self.layouts, self.leases, self.no_lease, self.silence, self.noise]

    def go_on(self, kind: Callable[[], None]) -> None:
        """Until it is over; a refusal is what they expect."""
        while not self.over.is_set():
            with suppress(grpc.RpcError, OSError):
                kind()
            self.calls += 1  # about: threads do not wait for each other here

    def huge_sets(self) -> None:
        self._transfer.AskChunks(mx_pb2.AskChunksRequest(lease_id="x", wanted=self._huge), timeout=CALL_SECONDS)

    def huge_metadata(self) -> None:
        request = mx_pb2.OpenTransferRequest(lease_id="x", nixl_metadata=self._huge)
        self._transfer.OpenTransfer(request, timeout=CALL_SECONDS)

    def no_lease(self) -> None:
        """As large as a message may be, by the protocol, under leases that never were."""
        extents = [mx_pb2.Extent(address=secrets.randbits(48)) for _ in range(64)]
        request = mx_pb2.OpenTransferRequest(
            mx_source_id=self.source["source_id"],
            lease_id=secrets.token_hex(16),
            fingerprint=self._fingerprint,
            nixl_metadata=secrets.token_bytes(ALLOWED_BYTES),
            extents=extents,
            operation=mx_pb2.OPERATION_WRITE,
        )
        self._transfer.OpenTransfer(request, timeout=CALL_SECONDS)

    def layouts(self) -> None:
        request = mx_pb2.GetLayoutRequest(mx_source_id=self.source["source_id"], fingerprint=secrets.token_hex(32))
        self._transfer.GetLayout(request, timeout=CALL_SECONDS)

    def leases(self) -> None:
        """Takes leases without reading anything."""
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=self.source["source_id"])
        self._leases.append(self._worker.PrepareTensorRead(request, timeout=CALL_SECONDS).lease_id)
        if len(self._leases) >= LEASES:
            release = p2p_pb2.ReleaseTensorReadRequest(
                mx_source_id=self.source["source_id"], lease_id=self._leases.popleft()
            )
            self._worker.ReleaseTensorRead(release, timeout=CALL_SECONDS)

    def silence(self) -> None:
        """Connections to the chunk port that say nothing, or something else."""
        connection = socket.create_connection((self._host, self._chunk_port), CALL_SECONDS)
        self._silent.append(connection)
        if len(self._silent) % 2:
            connection.sendall(secrets.token_bytes(1 << 16))
        if len(self._silent) >= SILENT:
            self._silent.popleft().close()
        self.over.wait(0.01)

    def noise(self) -> None:
        """What is no HTTP/2, to the port of the services."""
        with socket.create_connection((self._host, self._grpc_port), CALL_SECONDS) as connection:
            connection.sendall(secrets.token_bytes(1 << 16))
            connection.recv(1 << 16)

    def close(self) -> None:
        for connection in self._silent:
            connection.close()


def strangers_beside(seconds: float, seed: int) -> Beset:
    """A worker that serves one reader for so long while strangers call it. Raises FleetError where it ends."""
    chance = random.Random(seed)
    with Fleet(server=False) as fleet, ExitStack() as stack:
        holder = start(fleet, "tcp", role="seed", model_bytes=MODEL_BYTES)
        receiver = start(fleet, "tcp", role="receiver", model_bytes=MODEL_BYTES)
        source = holder.expect("serving")["source"]
        receiver.expect("ready")
        outcomes = receive(receiver, [source], RECEIVES, chance)
        before = most = rss_mib(holder.popen.pid)
        strangers = _Strangers(source, stack)
        threads = [threading.Thread(target=strangers.go_on, args=(kind,)) for kind in strangers.kinds()]
        ended_at = time.monotonic() + seconds
        done: list[dict[str, int]] = [outcomes]

        def read() -> None:
            with suppress(FleetError):
                while time.monotonic() < ended_at:
                    done.append(receive(receiver, [source], RECEIVES, chance))

        threads.append(threading.Thread(target=read))
        for thread in threads:
            thread.start()
        while time.monotonic() < ended_at and holder.alive:
            most = max(most, rss_mib(holder.popen.pid))
            time.sleep(SAMPLE_SECONDS)
        strangers.over.set()
        for thread in threads:
            thread.join()
        strangers.close()
        if not holder.alive:
            raise FleetError(f"strangers ended a worker; its log ends: {holder.tail()}")
        total = sum(sum(each.values()) for each in done)
        return Beset(strangers.calls, most - before, total, total - sum(each.get("right", 0) for each in done))


def rss_mib(pid: int) -> float:
    """Resident memory of a process; 0 where it has ended."""
    with suppress(OSError):
        if found := re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(found[1]) / 1024
    return 0.0
