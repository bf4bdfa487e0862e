"""Contexts, streams, events, memory: valid while they exist, freed in order, failing with names."""

from __future__ import annotations

import ctypes
import gc
import threading
import warnings

import pytest

from mxcore.cuda import (
    DeviceBuffer,
    Event,
    PinnedBuffer,
    Registration,
    Stream,
    context_of,
    copy_on_device,
    copy_to_device,
    copy_to_host,
)
from mxcore.cuda.context import current_context
from mxcore.cuda.memory import MAX_BYTES, live_device_bytes, live_pinned_bytes
from mxcore.errors import CudaError, DeviceMemoryError, HostBufferBusy, HostBufferClosed
from mxcore.memory import HostBuffer
from tests.cuda.stand_in import ROOT, StandIn

SIZE = 100_000


def fill(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def pattern(seed: int, size: int = SIZE) -> bytes:
    return bytes((seed + 31 * i + i // 255) % 256 for i in range(size))


def test_a_context_is_shared_and_given_back(driver: StandIn) -> None:
    context = context_of(0)
    assert context_of(0) is context
    assert context.index == 0
    assert driver.counts().contexts == 1
    stream = Stream(context)
    del context
    assert driver.counts().contexts == 1, "the stream holds it"
    stream.context.synchronize()
    del stream
    assert not any(driver.counts().live)


def test_a_context_is_the_one_that_somebody_else_made(driver: StandIn) -> None:
    """As torch does: it retains the device's primary context, and goes on with it when ours are gone."""
    library, theirs = ctypes.CDLL(str(driver.path)), ctypes.c_void_p()
    assert library.cuDevicePrimaryCtxRetain(ctypes.byref(theirs), 1) == 0
    stream = Stream(context_of(1))
    assert stream.context.address == theirs.value
    stream.synchronize()
    del stream
    assert driver.counts().contexts == 1
    popped = ctypes.c_void_p()
    assert library.cuCtxPushCurrent_v2(theirs) == 0
    assert context_of(1).memory_info()[0] > 0
    assert current_context() == theirs.value
    assert library.cuCtxPopCurrent_v2(ctypes.byref(popped)) == 0
    assert library.cuDevicePrimaryCtxRelease_v2(1) == 0


def test_no_function_that_makes_a_context_is_even_looked_up() -> None:
    table = (ROOT / "mxcore" / "cuda" / "cuda_driver.h").read_text()
    assert "cuDevicePrimaryCtxRetain" in table
    assert not [word for word in ("cuCtxCreate", "cuDevicePrimaryCtxReset", "cuCtxSetCurrent") if word in table]


def test_what_a_thread_has_current_stays(driver: StandIn) -> None:
    assert current_context() == 0
    first, second = context_of(0), context_of(1)
    stream, memory = Stream(second), DeviceBuffer(second, SIZE)
    Event(first)
    assert current_context() == 0
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend([Stream(second).address, current_context()]))
    thread.start()
    thread.join()
    assert found[1] == 0
    stream.synchronize()
    memory.close()


def test_bytes_go_through_the_device_and_back(driver: StandIn) -> None:
    context = context_of(0)
    pinned, back = PinnedBuffer(context, SIZE), PinnedBuffer(context, SIZE)
    first, second = DeviceBuffer(context, SIZE), DeviceBuffer(context, SIZE)
    stream = Stream(context)
    data = pattern(7)
    fill(pinned.address, data)
    copy_to_device(first.address, pinned.address, SIZE, stream)
    copy_on_device(second.address, first.address, SIZE, stream)
    copy_to_host(back.address, second.address, SIZE, stream)
    stream.synchronize()
    assert ctypes.string_at(back.address, SIZE) == data
    assert (live_pinned_bytes(), live_device_bytes()) == (2 * SIZE, 2 * SIZE)
    assert driver.counts().unpinned_copies == 0
    for memory in (pinned, back, first, second):
        memory.close()
        memory.close()
        with pytest.raises(HostBufferClosed):
            _ = memory.address


def test_streams_run_on_their_own_and_wait_for_events(driver: StandIn) -> None:
    context = context_of(0)
    pinned, memory = PinnedBuffer(context, SIZE), DeviceBuffer(context, SIZE)
    back = PinnedBuffer(context, SIZE)
    one, other = Stream(context), Stream(context)
    written = Event(context)
    data = pattern(3)
    fill(pinned.address, data)
    with driver.holding():
        copy_to_device(memory.address, pinned.address, SIZE, one)
        written.record(one)
        other.wait(written)
        copy_to_host(back.address, memory.address, SIZE, other)
        assert not one.done()
        assert not written.done()
        assert not other.done()
    other.synchronize()
    assert written.done()
    assert other.done()
    assert ctypes.string_at(back.address, SIZE) == data
    for buffer in (pinned, memory, back):
        buffer.close()


def test_an_event_of_somebody_elses_stream(driver: StandIn) -> None:
    context = context_of(0)
    event, own, theirs = Event(context), Stream(context), Stream(context)
    with driver.holding():
        event.record(theirs.address)  # a number, as torch gives it
        own.wait(event)
        assert not own.done()
    own.synchronize()
    event.record(0)  # the default stream
    event.synchronize()


def test_events_with_timing_measure(driver: StandIn) -> None:
    context = context_of(0)
    stream, begin, end = Stream(context), Event(context, timing=True), Event(context, timing=True)
    begin.record(stream)
    end.record(stream)
    end.synchronize()
    assert end.seconds_since(begin) >= 0
    with pytest.raises(CudaError, match="made with timing=True"):
        end.seconds_since(Event(context, timing=True))


def test_host_memory_is_pinned_as_long_as_its_registration(driver: StandIn) -> None:
    context = context_of(0)
    buffer = HostBuffer(SIZE)
    registration = Registration(context, buffer)
    assert (registration.device_address, registration.size_bytes) == (buffer.address, SIZE)
    with pytest.raises(HostBufferBusy):
        buffer.close()
    with pytest.raises(CudaError, match="712"):
        Registration(context, buffer)
    memory, stream = DeviceBuffer(context, SIZE), Stream(context)
    copy_to_device(memory.address, buffer.address, SIZE, stream)
    stream.synchronize()
    assert driver.counts().unpinned_copies == 0
    registration.close()
    registration.close()
    copy_to_device(memory.address, buffer.address, SIZE, stream)
    assert driver.counts().unpinned_copies == 1
    memory.close()
    buffer.close()


def test_memory_runs_out_by_name(driver: StandIn) -> None:
    driver.memory(1 << 20)
    context = context_of(0)
    held = DeviceBuffer(context, 600_000)
    with pytest.raises(DeviceMemoryError, match=r"cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY.*600000 bytes"):
        DeviceBuffer(context, 600_000)
    assert context.memory_info() == ((1 << 20) - 600_000, 1 << 20)
    held.close()
    driver.fail("cuMemHostAlloc", 2)
    with pytest.raises(DeviceMemoryError, match="pinned"):
        PinnedBuffer(context, SIZE)
    for size in (0, -1, MAX_BYTES + 1):
        with pytest.raises(ValueError, match="size_bytes"):
            DeviceBuffer(context, size)


@pytest.mark.parametrize("function", ["cuStreamCreate", "cuEventCreate", "cuMemAlloc_v2", "cuMemHostRegister_v2",
                                      "cuMemHostGetDevicePointer_v2", "cuCtxPushCurrent_v2"])  # fmt: skip
def test_nothing_half_made_is_left(driver: StandIn, function: str) -> None:
    context = context_of(0)
    before = driver.counts().live
    with HostBuffer(SIZE) as buffer:
        driver.fail(function, 719)
        made = {
            "cuStreamCreate": lambda: Stream(context),
            "cuEventCreate": lambda: Event(context),
            "cuMemAlloc_v2": lambda: DeviceBuffer(context, SIZE),
            "cuCtxPushCurrent_v2": lambda: DeviceBuffer(context, SIZE),
        }.get(function, lambda: Registration(context, buffer))
        with pytest.raises(CudaError, match=r"CUDA_ERROR_LAUNCH_FAILED \(719\)") as caught:
            made()
        assert caught.value.status == 719
        del caught
        gc.collect()
        assert driver.counts().live == before
        assert current_context() == 0
    assert (live_pinned_bytes(), live_device_bytes()) == (0, 0)


def test_a_failed_retain_is_no_context(driver: StandIn) -> None:
    driver.fail("cuDevicePrimaryCtxRetain", 2)
    with pytest.raises(DeviceMemoryError, match="device 1"):
        context_of(1)
    assert context_of(1).index == 1


@pytest.mark.parametrize("function", ["cuStreamDestroy_v2", "cuEventDestroy_v2", "cuMemFree_v2", "cuMemFreeHost"])
def test_a_destructor_warns_and_never_raises(driver: StandIn, function: str) -> None:
    context = context_of(0)
    made: list[object] = [
        {"cuStreamDestroy_v2": Stream, "cuEventDestroy_v2": Event}[function](context)
        if function.startswith(("cuStream", "cuEvent"))
        else {"cuMemFree_v2": DeviceBuffer, "cuMemFreeHost": PinnedBuffer}[function](context, SIZE)
    ]
    address = made[0].address  # type: ignore[attr-defined]
    driver.fail(function, 719)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.clear()
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert "CUDA_ERROR_LAUNCH_FAILED" in str(caught[0].message)
    assert "may have leaked" in str(caught[0].message)
    library = ctypes.CDLL(str(driver.path))  # frees what is said to have leaked: for the count
    popped = ctypes.c_void_p()
    assert library.cuCtxPushCurrent_v2(ctypes.c_uint64(context.address)) == 0
    assert getattr(library, function)(ctypes.c_uint64(address)) == 0
    assert library.cuCtxPopCurrent_v2(ctypes.byref(popped)) == 0


def test_a_driver_that_has_ended_leaves_no_warning(driver: StandIn) -> None:
    context = context_of(0)
    stream = Stream(context)
    place = stream.address
    driver.fail("cuStreamDestroy_v2", 4)  # deinitialized: the process is going down
    del stream
    ctypes.CDLL(str(driver.path)).cuStreamDestroy_v2(ctypes.c_uint64(place))


def test_errors_of_the_device_come_out_when_it_is_waited_for(driver: StandIn) -> None:
    context = context_of(0)
    pinned, memory, stream = PinnedBuffer(context, SIZE), DeviceBuffer(context, SIZE), Stream(context)
    event = Event(context)
    driver.fail_later("copy", 700)
    copy_to_device(memory.address, pinned.address, SIZE, stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.synchronize()
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.done()
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        event.record(stream)
    with pytest.raises(CudaError):
        context.synchronize()
    driver.reset()
    pinned.close()
    memory.close()


def test_broken_rules_are_seen(driver: StandIn) -> None:
    """The stand-in's own eyes: without them, the other tests would show little."""
    context, other = context_of(0), context_of(1)
    pinned, memory, stream = PinnedBuffer(context, SIZE), DeviceBuffer(context, SIZE), Stream(context)
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync"):
        copy_to_device(memory.address + 1, pinned.address, SIZE, stream)
    assert "go beyond their allocation" in driver.violation()
    gone = memory.address
    memory.close()
    with pytest.raises(CudaError):
        copy_to_device(gone, pinned.address, SIZE, stream)
    assert "were freed" in driver.violation()
    elsewhere = Stream(other)
    event = Event(context)
    with pytest.raises(CudaError):
        event.record(elsewhere.address)
    assert "stream of device 1 in the context of device 0" in driver.violation()
    with driver.holding():  # freed while a copy is under way
        late = DeviceBuffer(context, SIZE)
        copy_to_device(late.address, pinned.address, SIZE, stream)
        late.close()
    with pytest.raises(CudaError):
        stream.synchronize()
    assert "under way" in driver.violation()
    assert driver.counts().violations == 4
    driver.reset()
    pinned.close()
