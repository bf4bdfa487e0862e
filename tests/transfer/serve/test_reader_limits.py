"""What readers and strangers get out of a worker's ports, and what they can make it hold."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack

import grpc
import pytest

from mxcore.errors import HolderBusy, LeaseEnded
from mxcore.transfer.layout import ChunkRequest, Layout, all_chunks, build_layout
from mxcore.transfer.move import GREETING, TOKEN_BYTES, AgentSession, show_token
from mxcore.transfer.serve import ChunkListener, Holder
from mxcore.transfer.serve.worker_identity import WorkerIdentity
from mxcore.transfer.serve.worker_service import _server_options
from mxserver.wire.proto import mx_pb2, p2p_pb2
from tests.transfer.memory import HostTensors, model_specs
from tests.transfer.serve.test_chunk_port import exactly
from tests.transfer.serve.test_holder import POLICY, SOURCE_ID, Stubs, holder, new_holder, status_of, stubs

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


def test_windows_for_what_strangers_send_do_not_grow(holder: Holder) -> None:
    """`mx bench chaos` measures what that saves: worker_rss_growth_mib."""
    assert dict(_server_options(holder))["grpc.http2.bdp_probe"] == 0


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


def asked(holder: Holder, lease_id: str, most: int) -> list[int]:
    return holder.ask(lease_id, ChunkRequest(all_chunks(len(holder.chunks)), 0, most), 0).granted


def test_a_lease_that_reads_nothing_makes_room_for_another_reader() -> None:
    holder = new_holder(most_readers=2)
    idle, reading = holder.grant("host-1"), holder.grant("host-2")
    with pytest.raises(HolderBusy):
        holder.grant("host-3")
    for lease in (idle, reading):
        lease.read_at -= 1000  # as if time had passed, with calls that renew them
        holder.renew(lease.lease_id)
    assert asked(holder, reading.lease_id, 1)
    third = holder.grant("host-3")
    assert (idle.ended, reading.ended, third.ended) == (True, False, False)
    with pytest.raises(LeaseEnded):
        holder.renew(idle.lease_id)
    with pytest.raises(HolderBusy):
        holder.grant("host-1")
    holder.close()


def test_one_reader_cannot_have_all_places() -> None:
    holder = new_holder(most_readers=3)
    leases = [holder.grant("host-1") for _ in range(3)]
    with pytest.raises(HolderBusy):
        holder.grant("host-1")
    assert asked(holder, leases[0].lease_id, 1)
    holder.grant("host-2")
    assert [lease.ended for lease in leases].count(True) == 1
    assert not leases[0].ended
    with pytest.raises(HolderBusy):
        holder.grant("host-1")
    holder.close()


def test_a_reader_is_told_apart_by_where_it_calls_from(stubs: Stubs, holder: Holder) -> None:
    stubs.worker.PrepareTensorRead(p2p_pb2.PrepareTensorReadRequest(mx_source_id=SOURCE_ID))
    assert [lease.reader for lease in holder._leases.values()] == ["ipv4:127.0.0.1"]


def test_a_lease_ends_that_was_granted_everything_twice() -> None:
    holder = new_holder()
    lease, count = holder.grant(), len(holder.chunks)
    for _ in range(2 * count + 17):
        assert asked(holder, lease.lease_id, 1)
    with pytest.raises(LeaseEnded, match="was granted each chunk 2 times"):
        asked(holder, lease.lease_id, 1)
    patient = holder.grant()
    for _ in range(3 * count):  # what is declined was not taken
        granted = asked(holder, patient.lease_id, 1)
        holder.ask(patient.lease_id, ChunkRequest(0, 0, 0), 0, declined=granted)
    holder.close()


def test_the_rate_limit_binds_who_asks_the_chunk_port_for_more() -> None:
    """A reader gets what it was granted, once, and nothing that it was not."""
    holder = new_holder(rate_limit=1.0)
    listener = ChunkListener(holder, "127.0.0.1", 0)
    lease = holder.grant()
    token = holder.open_sending(lease.lease_id)
    [granted] = asked(holder, lease.lease_id, 8)
    other = next(chunk for chunk in range(len(holder.chunks)) if chunk != granted)
    for chunk, status in ((granted, 0), (granted, 1), (other, 1)):
        with socket.create_connection(("127.0.0.1", listener.port), 60) as connection:
            show_token(connection, token, 60)
            connection.sendall(struct.pack("<I", chunk))
            assert exactly(connection, 8) == struct.pack("<II", chunk, status)
            if not status:
                exactly(connection, holder.chunks.bytes_of(chunk))
    assert lease.sender is not None
    assert lease.sender.sent_bytes == holder.chunks.bytes_of(granted)
    listener.close()
    holder.close()


def test_what_is_received_anew_is_not_sent_to_who_was_granted_it_before() -> None:
    """The memory is about to be overwritten with other bytes (Receiver._start_anew)."""
    holder = new_holder()
    listener = ChunkListener(holder, "127.0.0.1", 0)
    lease = holder.grant()
    token = holder.open_sending(lease.lease_id)
    [granted] = asked(holder, lease.lease_id, 1)
    holder.update(0)
    with socket.create_connection(("127.0.0.1", listener.port), 60) as connection:
        show_token(connection, token, 60)
        connection.sendall(struct.pack("<I", granted))
        assert exactly(connection, 8) == struct.pack("<II", granted, 1)
    listener.close()
    holder.close()


def test_a_lease_has_one_open_transfer_and_the_other_agent_is_forgotten(
    holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(AgentSession(name, tls=POLICY.fenceable, progress_thread=False)) for name in "ab"
        )
        lease = holder.grant()
        holder.open_transfer(lease.lease_id, first.metadata(), holder.placement.addresses)
        monkeypatch.setattr(holder.agent.session(), "disconnect", forgotten.append)
        with pytest.raises(LeaseEnded, match="has an open transfer already"):
            holder.open_transfer(lease.lease_id, second.metadata(), holder.placement.addresses)
        assert (lease.peer, forgotten) == (first.name, [second.name])
        monkeypatch.undo()
        holder.release(lease.lease_id)


def test_the_layout_is_made_once_whoever_asks(stubs: Stubs, holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Layout] = []
    real = Layout.to_proto
    monkeypatch.setattr(Layout, "to_proto", lambda layout: made.append(layout) or real(layout))
    for number in range(3):
        request = mx_pb2.GetLayoutRequest(mx_source_id=SOURCE_ID, fingerprint=f"other {number}")
        assert stubs.transfer.GetLayout(request).layout == real(holder.layout)
    assert len(made) == 1


def test_the_manifest_is_serialised_once_whoever_asks(
    stubs: Stubs, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[WorkerIdentity] = []
    real = WorkerIdentity._manifest
    monkeypatch.setattr(WorkerIdentity, "_manifest", lambda identity: made.append(identity) or real(identity))
    manifests = [
        stubs.worker.GetTensorManifest(p2p_pb2.GetTensorManifestRequest(mx_source_id=SOURCE_ID)) for _ in range(2)
    ]
    leases = [
        stubs.worker.PrepareTensorRead(p2p_pb2.PrepareTensorReadRequest(mx_source_id=SOURCE_ID)) for _ in range(2)
    ]
    assert len(made) == 1
    assert len(manifests[0].tensors) == sum(tensor.extent is not None for tensor in holder.layout.tensors)
    assert all(each == real(made[0]) for each in (*manifests, *(lease.manifest for lease in leases)))
    assert len({lease.lease_id for lease in leases}) == 2
    assert isinstance(made[0].leased_manifest, bytes)
    assert made[0].leased_manifest is made[0].leased_manifest
