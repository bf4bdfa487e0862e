"""What readers and strangers get out of a worker's ports, and what they can make it hold."""

from __future__ import annotations

import socket
import threading

import grpc
import pytest

from mxcore.transfer.layout import build_layout
from mxcore.transfer.move import GREETING, TOKEN_BYTES, AgentSession
from mxcore.transfer.serve import ChunkListener, Holder
from mxserver.wire.proto import mx_pb2
from tests.transfer.memory import HostTensors, model_specs
from tests.transfer.serve.test_holder import POLICY, SOURCE_ID, Stubs, holder, status_of, stubs

__all__ = ["holder", "stubs"]  # fixtures


def test_a_reader_that_is_written_to_gets_nothing_to_write_with(stubs: Stubs, holder: Holder) -> None:
    tensors = HostTensors(model_specs(1), None)
    layout, placement = build_layout("raw", tensors.local_tensors())
    with AgentSession("receiver", tls=POLICY.fenceable, progress_thread=False) as session, session.progressing():
        session.register(layout, placement)
        lease = holder.grant()
        assert not holder.agent.name  # nobody has needed one
        answer = stubs.transfer.OpenTransfer(
            mx_pb2.OpenTransferRequest(
                mx_source_id=SOURCE_ID,
                lease_id=lease.lease_id,
                fingerprint=layout.fingerprint,
                operation=mx_pb2.OPERATION_WRITE,
                extents=[mx_pb2.Extent(address=address) for address in placement.addresses],
                nixl_metadata=session.metadata(),
            )
        )
        assert answer.operation == mx_pb2.OPERATION_WRITE
        assert (answer.nixl_metadata, list(answer.extents)) == (b"", [])
        assert holder.agent.name == answer.agent_name != ""
        holder.release(lease.lease_id)


def test_a_message_longer_than_any_reader_needs_is_refused_unread(stubs: Stubs) -> None:
    request = mx_pb2.AskChunksRequest(lease_id="nobody", wanted=b"\xff" * (1 << 20), most=1)
    assert status_of(lambda: stubs.transfer.AskChunks(request))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_lease_is_looked_up_before_anything_is_parsed(
    stubs: Stubs, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    name = "mxcore.transfer.serve.worker_service.set_from_bytes"
    monkeypatch.setattr(name, lambda data, count: parsed.append(len(data)) or 0)
    stranger = mx_pb2.AskChunksRequest(lease_id="nobody", wanted=b"\xff", most=1)
    assert status_of(lambda: stubs.transfer.AskChunks(stranger))[0] is grpc.StatusCode.NOT_FOUND
    assert parsed == []
    stubs.transfer.AskChunks(mx_pb2.AskChunksRequest(lease_id=holder.grant().lease_id, wanted=b"\xff", most=1))
    assert parsed == [1, 0]


def test_chunks_are_sent_without_waiting_for_acknowledgements(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    sent = threading.Event()

    def send(token: bytes, connection: socket.socket) -> None:
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        sent.set()

    monkeypatch.setattr(holder, "send_chunks", send)
    listener = ChunkListener(holder, "127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", listener.port), 60) as connection:
            connection.sendall(GREETING + b"t" * TOKEN_BYTES)
        assert sent.wait(60)
    finally:
        listener.close()
    assert seen != [0]
    assert len(seen) == 1
