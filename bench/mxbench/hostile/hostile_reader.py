"""A hostile reader, in a process of its own: with all that a holder tells it, it tries to change what is served.

It has a lease, as any reader has; over NIXL an agent of its own, which it makes the holder connect to.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import numpy as np

from mxcore.cuda import OpenedMemory, Stream, address_range, context_of, copy_to_device
from mxcore.cuda import driver as cuda_driver
from mxcore.errors import SourceUnreachable
from mxcore.memory import HostBuffer
from mxcore.transfer.layout import ChunkRequest, Layout, Placement, all_chunks
from mxcore.transfer.move import AgentSession, ChunkTls, Move, Source, SourceClient, show_token
from mxserver.wire import MxError
from mxserver.wire.calls import open_channel
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.proto import mx_pb2, p2p_pb2, p2p_pb2_grpc

OPERATIONS = (mx_pb2.OPERATION_SEND, mx_pb2.OPERATION_WRITE, mx_pb2.OPERATION_READ, mx_pb2.OPERATION_STAGE)
SECONDS = 10.0
JUNK_BYTES = 256 << 10
FOUND = ("told_metadata", "told_addresses", "changed", "connections", "written_to", "mapped_bytes", "refusals")


class HostileReader:
    """One that knows the protocol. `device_memory`: the holder's weights lie on a device."""

    def __init__(self, client: SourceClient, *, device_memory: bool) -> None:
        self.client = client
        self.device_memory = device_memory
        answer = client.get_layout("another")
        self.layout, self.offer = Layout.from_proto(answer.layout), answer.transport
        self.chunks = -(-self.layout.total_bytes // answer.chunk_bytes)
        self.memory = [np.full(max(size, 1), 0xA5, np.uint8) for size in self.layout.extent_bytes]
        self.placement = Placement(tuple(int(part.ctypes.data) for part in self.memory), (0,) * len(self.memory), "cpu")
        self.told_metadata = 0
        self.told_addresses = 0
        self.changed = 0
        self.connections = 0  # to the chunk port, with a token
        self.written_to = 0  # chunks that the holder WROTE into this process
        self.mapped_bytes = 0  # of the holder's device memory
        self.refusals: list[str] = []

    def attack(self, tls: str) -> None:
        """All that it can try. With UCX's transports `tls` it has an agent."""
        if not tls:
            self._with(None)
            return
        with AgentSession("hostile", tls=tls, progress_thread=False) as session, session.progressing():
            session.register(self.layout, self.placement)
            self._with(session)

    def _with(self, session: AgentSession | None) -> None:
        for operation in OPERATIONS:
            lease = self.client.prepare()
            for extents in (self.placement.addresses, tuple(self._manifest_addresses())):
                try:
                    self._open(operation, lease, session, extents)
                except MxError as error:
                    self.refusals.append(str(error)[:200])
            with suppress(MxError):
                self.client.release(lease)

    def _open(self, operation: Any, lease: str, session: AgentSession | None, addresses: tuple[int, ...]) -> None:
        answer = self.client.open_transfer(
            lease,
            self.layout.fingerprint,
            session.metadata() if session else b"",
            [mx_pb2.Extent(address=address, device_id=0) for address in addresses],
            operation,
            device_memory=self.device_memory,
        )
        self.told_metadata += bool(answer.nixl_metadata)
        self.told_addresses += len(answer.extents)
        if operation == mx_pb2.OPERATION_SEND:
            self._shout(lease, answer.token)
        if operation == mx_pb2.OPERATION_STAGE:
            self._overwrite(lease, answer.staging)
        if session is None:
            return
        if operation == mx_pb2.OPERATION_WRITE:  # the holder connects to this agent
            self.written_to += len(list(self.client.push_chunks(lease, range(self.chunks), SECONDS, notify=False)))
        peer = session.connect(answer.nixl_metadata) if answer.nixl_metadata else answer.agent_name
        known = [extent.address for extent in answer.extents] or list(self._manifest_addresses())
        self._write(session, peer, known)

    def _write(self, session: AgentSession, peer: str, there: list[int]) -> None:
        """WRITEs over the holder's weights, and READs what is there then."""
        remote = array("Q", there[: len(self.memory)])
        move = Move(
            0,
            array("Q", self.placement.addresses),
            remote,
            array("Q", self.layout.extent_bytes),
            0 if self.device_memory else None,
        )
        list(session.run("read", [move], peer, in_flight_limit=1))
        before = [part.copy() for part in self.memory]
        for part in self.memory:
            part[:: max(1, part.size // 16)] += 1  # not so that a second time undoes it
        list(session.run("write", [move], peer, in_flight_limit=1))
        for part in self.memory:
            part.fill(0)
        list(session.run("read", [move], peer, in_flight_limit=1))
        self.changed += sum(int(np.count_nonzero(a != b)) for a, b in zip(before, self.memory, strict=True))

    def _overwrite(self, lease: str, staging: mx_pb2.StagingBuffer) -> None:
        """Writes to all that it may map, before, while and after chunks are put there."""
        context = context_of(0)
        with closing(OpenedMemory(context, staging.handle)) as memory, HostBuffer(JUNK_BYTES) as junk:
            base, size_bytes = address_range(memory.address)
            stream = Stream(context)
            self.client.ask(lease, ChunkRequest(all_chunks(self.chunks), 0, self.chunks), self.chunks).result()
            for chunk in range(self.chunks):
                call = self.client.stage_chunk(lease, chunk, chunk % staging.slots)
                for begin in range(base, base + size_bytes, JUNK_BYTES):
                    length = min(JUNK_BYTES, base + size_bytes - begin)
                    copy_to_device(begin, junk.address, length, stream)
                stream.synchronize()
                with suppress(MxError):
                    call.result()
            self.mapped_bytes += size_bytes

    def _shout(self, lease: str, token: bytes) -> None:
        """Over the chunk port: asks for what it was granted and more, and sends what is no request."""
        self.client.ask(lease, ChunkRequest(all_chunks(self.chunks), 0, self.chunks), self.chunks).result()
        chance = random.Random(token)
        for junk in (b"".join(self._requests()), chance.randbytes(JUNK_BYTES), self.memory[0].tobytes()[:JUNK_BYTES]):
            with suppress(OSError), closing(self._connection()) as connection:
                show_token(connection, token, SECONDS)
                self.connections += 1
                connection.settimeout(SECONDS / 5)
                connection.sendall(junk)
                while connection.recv(1 << 20):
                    pass

    def _requests(self) -> Iterator[bytes]:
        for chunk in (*range(self.chunks), 0, self.chunks, 1 << 31, (1 << 32) - 1):
            yield struct.pack("<I", chunk)

    def _connection(self) -> socket.socket:
        host = self.client.source.endpoint.rpartition(":")[0].strip("[]")
        connection = socket.create_connection((host, self.offer.chunk_port), SECONDS)
        if not self.offer.chunk_tls:
            return connection
        return ChunkTls.of(ClientCredentials.from_environ()).secured(connection, host, SECONDS)

    def _manifest_addresses(self) -> Iterator[int]:
        """Where the released protocol's manifest says that the extents begin."""
        source = self.client.source
        with open_channel(source.endpoint, to_worker=True) as channel:
            worker = p2p_pb2_grpc.WorkerServiceStub(channel)
            request = p2p_pb2.GetTensorManifestRequest(mx_source_id=source.source_id, worker_id=source.worker_id)
            there = {each.name: each.addr for each in worker.GetTensorManifest(request, timeout=SECONDS).tensors}
        begins: dict[int, int] = {}
        for tensor in self.layout.tensors:
            if tensor.extent is not None:
                begins.setdefault(tensor.extent, there[tensor.name] - tensor.offset_bytes)
        yield from (begins[extent] for extent in sorted(begins))


def main() -> None:
    """Attacks the holder that the argument names; prints what came of it, as one line of JSON."""
    answers = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    if task["stand_in"]:
        cuda_driver._load_stand_in(task["stand_in"])  # the holder's device memory is host memory to NIXL
    source = Source(worker_rank=0, **task["source"])
    found: dict[str, Any] = {"let_in": False}
    with SourceClient(source, timeout_seconds=SECONDS) as client, suppress(SourceUnreachable):
        reader = HostileReader(client, device_memory=bool(task["stand_in"]))
        reader.attack(task["tls"])
        found = {"let_in": True, **{name: getattr(reader, name) for name in FOUND}}
    answers.write(json.dumps(found) + "\n")
    answers.flush()
    os._exit(0)  # whatever its agent is about


if __name__ == "__main__":
    main()
