"""Host buffers: alignment, exports by buffer protocol and DLPack, close, leaks."""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxcore.errors import HostBufferBusy, HostBufferClosed, HostMemoryError, MxError
from mxcore.memory import HostBuffer
from mxcore.memory.host_buffer import live_host_buffers, live_host_bytes

MIB = 1 << 20


@given(
    st.integers(1, 5 * MIB),
    st.sampled_from([1, 64, 4096, 8192, 65536, 2 * MIB, 4 * MIB]),
    st.booleans(),
)
def test_alignment_and_size(size_bytes: int, alignment_bytes: int, huge_pages: bool) -> None:
    with HostBuffer(size_bytes, alignment_bytes=alignment_bytes, huge_pages=huge_pages) as buffer:
        assert buffer.size_bytes == len(buffer) == len(memoryview(buffer)) == size_bytes
        assert buffer.alignment_bytes >= max(alignment_bytes, 4096)
        assert buffer.address % buffer.alignment_bytes == 0
        if buffer.huge_pages:
            assert huge_pages
            assert buffer.address % (2 * MIB) == 0
        if size_bytes < 2 * MIB:
            assert not buffer.huge_pages
        with memoryview(buffer) as view:
            assert view[0] == view[-1] == 0
            view[0] = view[-1] = 255
        assert live_host_buffers() == 1
        assert live_host_bytes() == size_bytes


def test_huge_pages_are_asked_for() -> None:
    """The kernel's own account of the mapping says so ("hg"), where it has them."""
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]:
        pytest.skip("transparent huge pages are switched off in this kernel")
    with HostBuffer(4 * MIB) as buffer:
        assert buffer.huge_pages
        maps = Path("/proc/self/smaps").read_text()
        mapping = maps[re.search(rf"^[0-9a-f]*-?{buffer.address:x}-?", maps, re.MULTILINE).start() :]  # type: ignore[union-attr]
        assert "hg" in re.search(r"^VmFlags: (.*)$", mapping, re.MULTILINE)[1].split()  # type: ignore[index]


def test_it_is_a_writable_buffer_of_bytes() -> None:
    with HostBuffer(10) as buffer:
        view = memoryview(buffer)
        assert (view.format, view.itemsize, view.ndim, view.shape, view.strides) == ("B", 1, 1, (10,), (1,))
        assert view.c_contiguous
        assert not view.readonly
        view[:] = bytes(range(10))
        array = np.frombuffer(buffer, np.uint8)
        assert array.ctypes.data == buffer.address
        assert array.tolist() == list(range(10))
        assert buffer.exports == 2
        with pytest.raises(HostBufferBusy, match="2 exports"):
            buffer.close()
        assert array[3] == 3
        del array
        view.release()
        assert buffer.exports == 0


@pytest.mark.parametrize("take", [np.from_dlpack, torch.from_dlpack, torch.utils.dlpack.from_dlpack])
def test_dlpack_is_no_copy_and_keeps_the_memory(take: object) -> None:
    assert callable(take)
    buffer = HostBuffer(3 * MIB)
    tensor = take(buffer)
    assert tuple(tensor.shape) == (3 * MIB,)
    assert str(tensor.dtype).endswith("uint8")
    tensor[5] = 7
    assert memoryview(buffer)[5] == 7
    with pytest.raises(HostBufferBusy):
        buffer.close()
    address = buffer.address
    del buffer  # the tensor still holds it
    gc.collect()
    assert live_host_buffers() == 1
    assert int(tensor[5]) == 7
    assert (tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()) == address
    with pytest.warns(ResourceWarning, match="never closed"):
        del tensor
    assert live_host_buffers() == 0


@pytest.mark.parametrize(
    ("max_version", "name"),
    [
        (None, "dltensor"),
        ((0, 8), "dltensor"),
        ((1, 0), "dltensor_versioned"),
        ((1, 1), "dltensor_versioned"),
        ((2, 0), "dltensor_versioned"),
    ],
)
def test_capsules_by_version(max_version: tuple[int, int] | None, name: str) -> None:
    with HostBuffer(10) as buffer:
        capsule = buffer.__dlpack__(max_version=max_version)
        assert f'"{name}"' in repr(capsule)
        assert buffer.exports == 1
        del capsule  # never consumed: gives its export back
        assert buffer.exports == 0
        tensor = torch.from_dlpack(buffer.__dlpack__(max_version=max_version))
        assert buffer.exports == 1
        tensor[0] = 9
        assert memoryview(buffer)[0] == 9
        del tensor
        assert buffer.exports == 0


def test_dlpack_refuses_what_it_cannot_do() -> None:
    with HostBuffer(10) as buffer:
        assert buffer.__dlpack_device__() == (1, 0)
        assert buffer.__dlpack__(dl_device=(1, 0), copy=False) is not None
        for arguments in ({"stream": 1}, {"dl_device": (2, 0)}, {"copy": True}):
            with pytest.raises(BufferError):
                buffer.__dlpack__(**arguments)  # type: ignore[arg-type]
        assert buffer.exports == 0


def test_after_close() -> None:
    buffer = HostBuffer(10)
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert buffer.size_bytes == 10
    assert repr(buffer) == "<HostBuffer of 10 bytes, closed>"
    for use in (lambda: buffer.address, lambda: memoryview(buffer), buffer.__dlpack__, buffer.__enter__):
        with pytest.raises(HostBufferClosed, match=r"made at .*test_host_buffer\.py:\d+ is closed"):
            use()
    assert issubclass(HostBufferClosed, BufferError)
    assert issubclass(HostBufferBusy, MxError)


@pytest.mark.parametrize("size_bytes", [0, -1, (1 << 46) + 1, 1 << 70])
def test_refused_sizes(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="size_bytes is"):
        HostBuffer(size_bytes)


@pytest.mark.parametrize("alignment_bytes", [0, -4096, 3, 4095, 1 << 47])
def test_refused_alignments(alignment_bytes: int) -> None:
    with pytest.raises(ValueError, match="alignment_bytes is"):
        HostBuffer(1, alignment_bytes=alignment_bytes)


def test_no_memory_is_an_error() -> None:
    with pytest.raises(HostMemoryError, match="Cannot allocate memory"):
        HostBuffer(1 << 46)
    assert issubclass(HostMemoryError, MemoryError)


def test_never_closed_warns_with_the_line_that_made_it() -> None:
    with pytest.warns(ResourceWarning) as caught:
        HostBuffer(10)
    here = f"{__file__}:{sys._getframe().f_lineno - 1}"
    assert [str(warning.message) for warning in caught] == [f"HostBuffer of 10 bytes made at {here} was never closed"]


def test_a_warning_that_is_an_error_does_not_raise_out_of_the_destructor() -> None:
    script = "from mxcore.memory.host_buffer import *; HostBuffer(10); print(live_host_buffers())"
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "0\n"
    assert "ResourceWarning: HostBuffer of 10 bytes made at <string>:1 was never closed" in done.stderr


def test_an_export_outlives_the_interpreter_quietly() -> None:
    script = (
        "import torch\nfrom mxcore.memory.host_buffer import HostBuffer\nbuffer = HostBuffer(10)\n"
        "tensor = torch.from_dlpack(buffer)\nview = memoryview(buffer)\ncapsule = buffer.__dlpack__()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == ""
    assert "Error" not in done.stderr


def test_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    for _ in range(20):
        with HostBuffer(32 * MIB) as buffer:
            np.frombuffer(buffer, np.uint8)[:] = 1
    assert resident() - before < 32 * MIB


def test_tensors_released_by_other_threads() -> None:
    """The deleter takes the GIL itself; counts stay right."""
    with HostBuffer(100) as buffer:

        def export() -> None:
            for _ in range(300):
                tensor = torch.from_dlpack(buffer)
                del tensor
                memoryview(buffer).release()

        threads = [threading.Thread(target=export) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.exports == 0


def test_closing_and_exporting_at_once() -> None:
    """Whoever comes first: a view of live memory, or HostBufferClosed; never a view of memory that is gone."""
    for _ in range(30):
        buffer = HostBuffer(16 * MIB)
        memoryview(buffer)[::4096] = bytes(4096)  # memory that takes a while to give back
        outcomes: list[int] = []

        def use(buffer: HostBuffer = buffer, outcomes: list[int] = outcomes) -> None:
            while True:
                try:
                    with memoryview(buffer) as view:
                        outcomes.append(view[-1])
                except HostBufferClosed:
                    return

        thread = threading.Thread(target=use)
        thread.start()
        while not buffer.closed:
            with contextlib.suppress(HostBufferBusy):
                buffer.close()
        thread.join()
        assert not any(outcomes)


def test_it_is_final_and_takes_no_weak_reference() -> None:
    """So that nothing else can decide when its memory goes."""
    with HostBuffer(1) as buffer:
        with pytest.raises(TypeError):
            weakref.ref(buffer)
        with pytest.raises(TypeError):
            type("Sub", (HostBuffer,), {})
