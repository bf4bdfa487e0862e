"""The buffer out of which readers on this host take chunks of device memory, on the driver without a GPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest

from mxcore.cuda import context_of
from mxcore.errors import CudaError, LeaseEnded, NotOneSided, PeerLost, SourceRefused
from mxcore.transfer.layout import Chunks, build_layout
from mxcore.transfer.move import SourceClient, StagedMover
from mxcore.transfer.serve.staging import Staging
from mxserver.wire.proto import mx_pb2
from tests.cuda.device_tensors import MADE, DeviceTensors
from tests.cuda.holder import CHUNK_BYTES
from tests.cuda.stand_in import StandIn
from tests.cuda.transfer.test_same_device import holder, source_of
from tests.transfer.memory import model_specs


@pytest.fixture
def weights(driver: StandIn) -> Iterator[DeviceTensors]:
    driver.share()
    tensors = DeviceTensors(model_specs(1), 3)
    yield tensors
    MADE.remove(tensors)
    tensors.close()


@pytest.fixture
def chunks(weights: DeviceTensors) -> Chunks:
    return Chunks(build_layout("raw", weights.local_tensors())[0], CHUNK_BYTES)


@pytest.fixture
def staging(weights: DeviceTensors, chunks: Chunks) -> Iterator[Staging]:
    placement = build_layout("raw", weights.local_tensors())[1]
    made = Staging(chunks, chunks.local_addresses(placement), placement)
    yield made
    assert made.close(60)


def in_slot(staging: Staging, lease: str, slot: int, size_bytes: int) -> bytes:
    buffer = staging._readers[lease].buffer
    return ctypes.string_at(buffer._memory.address + slot * buffer._slot_bytes, size_bytes)


def test_a_chunk_lies_in_its_slot_part_after_part(staging: Staging, chunks: Chunks, weights: DeviceTensors) -> None:
    told = staging.open("a")
    assert (told.slots, told.slot_bytes) == (2, CHUNK_BYTES)
    staging.allow("a", [0, len(chunks) - 1])
    for slot, chunk in enumerate((0, len(chunks) - 1)):
        staging.fill("a", chunk, slot)
        pairs = zip(chunks.slice_of(staging._addresses, chunk), chunks.slice_of(chunks.lengths, chunk), strict=True)
        expected = b"".join(ctypes.string_at(address, length) for address, length in pairs)
        assert in_slot(staging, "a", slot, len(expected)) == expected
    assert len(weights.buffers) > 1


def test_a_buffer_serves_one_lease_after_the_other(staging: Staging, driver: StandIn) -> None:
    """It is not freed between them: whose lease has ended may have it mapped still."""
    first, second = staging.open("a"), staging.open("b")
    assert first.handle != second.handle
    allocations = driver.counts().device_allocations
    staging.end("a")
    staging.end("a")
    assert staging.open("c").handle == first.handle
    assert driver.counts().device_allocations == allocations
    with pytest.raises(LeaseEnded):
        staging.fill("a", 0, 0)


def test_a_buffer_that_is_being_filled_is_not_another_ones(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    first = staging.open("a")
    staging.allow("a", [0])
    begun, go_on = threading.Event(), threading.Event()
    buffer = staging._readers["a"].buffer
    real = buffer.fill

    def slow(*arguments: object) -> None:
        begun.set()
        assert go_on.wait(60)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(buffer, "fill", slow)
    thread = threading.Thread(target=staging.fill, args=("a", 0, 0))
    thread.start()
    assert begun.wait(60)
    staging.end("a")
    assert staging.open("b").handle != first.handle
    assert not staging.close(0.01)  # it waits for copies, not for ever
    go_on.set()
    thread.join(60)
    with pytest.raises(LeaseEnded, match="stopped serving"):
        staging.open("c")


def test_what_is_not_there_any_more_is_not_staged(staging: Staging) -> None:
    staging.open("a")
    staging.allow("a", [0, 1])
    staging.fill("a", 0, 0)
    staging.forbid_all()
    with pytest.raises(ValueError, match="was not granted"):
        staging.fill("a", 1, 0)


def test_where_there_is_no_device_memory_no_lease_has_a_buffer(staging: Staging, driver: StandIn) -> None:
    driver.fail("cuMemAlloc_v2", 2)
    with pytest.raises(CudaError):
        staging.open("a")
    assert staging.open("a").handle  # asked again


def test_a_mover_ends_when_it_is_told_to(driver: StandIn, weights: DeviceTensors, chunks: Chunks) -> None:
    local = chunks.local_addresses(build_layout("raw", weights.local_tensors())[1])
    with holder(driver, "serve", checked=True) as line, SourceClient(source_of(line), timeout_seconds=60) as client:
        fingerprint, lease = client.get_layout("another").fingerprint, client.prepare()
        told = client.open_transfer(lease, fingerprint, b"", (), mx_pb2.OPERATION_STAGE, device_memory=True).staging

        def mover(staging: mx_pb2.StagingBuffer) -> StagedMover:
            return StagedMover(client, lease, staging, context_of(0), chunks, local, stall_timeout_seconds=60)

        for name, value in (
            ("slots", 0),
            ("slots", (1 << 32) - 1),
            ("slot_bytes", 1),
            ("slot_bytes", 1 << 40),
            ("offset", 3 << 20),
            ("handle", b"x"),
        ):
            wrong = mx_pb2.StagingBuffer.FromString(told.SerializeToString())
            setattr(wrong, name, value)
            with pytest.raises(NotOneSided, match="the buffer of worker"):
                mover(wrong)
        with mover(told) as first:
            assert first.idle
            first.wake()
            assert list(first.arrived()) == []
            first.ask([0])  # which was not granted
            assert not first.idle
            with pytest.raises(SourceRefused, match="was not granted"):
                list(first.arrived())
        with mover(told) as second:
            second.ask([0])
            second.interrupt(PeerLost("enough"))
            with pytest.raises(PeerLost, match="enough"):
                list(second.arrived())
        assert driver.counts().opened == 0
        client.release(lease)


def test_a_buffer_that_cannot_be_unmapped_is_told(
    driver: StandIn, weights: DeviceTensors, chunks: Chunks, caplog: pytest.LogCaptureFixture
) -> None:
    """What came by it is good all the same: nothing arrives by a mapping that nobody reads through."""
    local = chunks.local_addresses(build_layout("raw", weights.local_tensors())[1])
    with holder(driver, "serve") as line, SourceClient(source_of(line), timeout_seconds=60) as client:
        fingerprint, lease = client.get_layout("another").fingerprint, client.prepare()
        told = client.open_transfer(lease, fingerprint, b"", (), mx_pb2.OPERATION_STAGE, device_memory=True).staging
        mover = StagedMover(client, lease, told, context_of(0), chunks, local, stall_timeout_seconds=60)
        address = mover._memory.address
        driver.fail("cuIpcCloseMemHandle", 719)
        mover.close()
        assert "cannot be unmapped" in caplog.text
        assert "CUDA_ERROR_LAUNCH_FAILED" in caplog.text
        caplog.clear()  # its records hold the error, and that the frames it went through
        client.release(lease)
    driver.unmap(address)
