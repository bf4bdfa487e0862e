"""What vLLM's loaders copy into parameters on a device: by the ring, in order, or by way of bounded host memory.

torch without CUDA has no such tensors; from the copy's decision on, everything runs on addresses of the stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from mxcore.cuda import Stream, context_of, copy_on_device
from mxcore.cuda.memory import live_pinned_bytes
from mxcore.engine import lazy_tensors as module
from mxcore.engine import lazy_weights
from mxcore.engine.lazy_tensors import LazyTensor
from mxcore.errors import FileChanged
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.load import release_rings
from mxcore.storage.plan import budget
from tests.cuda.device_tensor import DeviceTensor, same_bits
from tests.cuda.stand_in import StandIn


class TorchStream(NamedTuple):
    cuda_stream: int


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return {"w": torch.randn(512, 1024), "e": torch.randn(4, 300, 256).bfloat16(), "s": torch.randn(7)}


@pytest.fixture
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Checkpoint:
    save_file(tensors, tmp_path / "a.safetensors")
    return open_checkpoint([tmp_path / "a.safetensors"])


@pytest.fixture
def theirs(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The stream that torch has current."""
    stream = Stream(context_of(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: TorchStream(stream.address))
    yield stream
    release_rings()
    assert budget().held_bytes == 0


def lazy(checkpoint: Checkpoint, **more: Any) -> Iterator[tuple[str, LazyTensor]]:
    for name, tensor in lazy_weights(checkpoint, lazy_least_bytes=100, mode="buffered", **more):
        if isinstance(tensor, LazyTensor):
            yield name, tensor


PARTS = {
    "whole": lambda t: t,
    "rows of a rank": lambda t: t.narrow(0, 1, 2),
    "columns of a rank": lambda t: t.narrow(t.dim() - 1, 128, 128),
    "one of a stack": lambda t: t[2],
    "a slice of one": lambda t: t[1][..., 64:192],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_lands_through_the_ring(
    driver: StandIn, theirs: Stream, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], part: str
) -> None:
    for name, tensor in lazy(checkpoint):
        source, expected = PARTS[part](tensor), PARTS[part](tensors[name])
        parameter = DeviceTensor(context_of(0), torch.empty(expected.shape, dtype=expected.dtype))
        before = driver.counts()
        assert module._fill(parameter, source)
        counts = driver.counts()
        assert same_bits(parameter.on_host(), expected), name
        assert parameter.copied == []
        assert not source.has_been_read
        assert tensor._source.read_bytes >= expected.nbytes
        assert counts.device_allocations == before.device_allocations, "nothing else on the device"
        assert counts.unpinned_copies == 0
        beside = budget().held_bytes - live_pinned_bytes()
        assert live_pinned_bytes() > beside < expected.nbytes, "one ring, and what the small tensors come through"
        parameter.buffer.close()


def test_a_part_of_a_fused_parameter(theirs: Stream, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    fused = DeviceTensor(context_of(0), torch.empty(1024, 1024))
    for name, tensor in lazy(checkpoint):
        if name == "w":
            assert module._fill(fused[512:], tensor)
            assert module._fill(fused[:512], tensor)
    assert same_bits(fused.on_host(), torch.cat([tensors["w"]] * 2))
    fused.buffer.close()


def test_it_comes_after_what_torch_was_given(
    driver: StandIn, theirs: Stream, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]
) -> None:
    """An allocator hands out memory that work of its stream still uses."""
    parameter, other = (DeviceTensor(context_of(0), tensors["w"]) for _ in range(2))
    [(_, tensor)] = [(name, tensor) for name, tensor in lazy(checkpoint) if name == "w"]
    tensor.copy_into(parameter)  # the ring is made
    for _ in range(40):
        copy_on_device(parameter.data_ptr(), other.data_ptr(), tensors["w"].nbytes, theirs)
    tensor.copy_into(parameter)
    assert same_bits(parameter.on_host(), tensors["w"])
    assert theirs.done(), "what was given before is done as well"
    parameter.buffer.close()
    other.buffer.close()


def test_only_what_is_needed_is_read(theirs: Stream, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    parameter = DeviceTensor(context_of(0), tensors["w"])
    parameter.copy_(torch.zeros(512, 1024))
    for name, tensor in lazy(checkpoint, needed=lambda to: [(0, 10), (500, 512)]):
        if name == "w":
            assert module._fill(parameter, tensor)
            assert tensor._source.read_bytes == 22 * 4096
    found = parameter.on_host()
    assert same_bits(found[:10], tensors["w"][:10])
    assert same_bits(found[500:], tensors["w"][500:])
    assert not found[10:500].any()
    parameter.buffer.close()


@pytest.mark.parametrize(
    "parameter", [torch.empty(512, 1024, dtype=torch.bfloat16), torch.empty(1024, 512).t()], ids=["dtype", "strewn"]
)
def test_what_cannot_go_straight_goes_in_pieces(
    theirs: Stream,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    parameter: torch.Tensor,
) -> None:
    monkeypatch.setattr(module, "STAGED_BYTES", 100 * 4096)
    there = DeviceTensor(context_of(0), parameter)
    for name, tensor in lazy(checkpoint):
        if name == "w":
            assert module._fill(there, tensor)
            assert not tensor.has_been_read
    assert there.copied == [(100, 1024)] * 5 + [(12, 1024)]
    assert same_bits(there.on_host(), tensors["w"].to(parameter.dtype))
    there.buffer.close()


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync_v2", "cuStreamCreate", "cuModuleLoadDataEx"])
def test_a_device_that_fails_is_not_tried_again_and_the_bytes_are_right(
    driver: StandIn,
    theirs: Stream,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    driver.fail(function, 719)
    for name, tensor in lazy(checkpoint):
        parameter = DeviceTensor(context_of(0), tensors[name])
        assert module._fill(parameter, tensor)
        assert same_bits(parameter.on_host(), tensors[name])
        parameter.buffer.close()
    warnings = [record for record in caplog.records if "by way of ordinary host memory" in record.message]
    assert len(warnings) <= 1
    caplog.clear()  # its records hold errors, and those the frames they went through


def test_a_ring_that_changes_bytes_is_never_used(
    driver: StandIn,
    theirs: Stream,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first copies measure the bus; one of those after them, which prove the ring, comes out wrong."""
    driver.flip(after=12)
    for _ in range(2):
        for name, tensor in lazy(checkpoint):
            parameter = DeviceTensor(context_of(0), tensors[name])
            assert module._fill(parameter, tensor)
            assert same_bits(parameter.on_host(), tensors[name])
            assert parameter.copied == [tuple(tensors[name].shape)]
            parameter.buffer.close()
    assert "known bytes came out of its ring changed" in caplog.text
    assert budget().held_bytes == live_pinned_bytes() == 0
    caplog.clear()


def test_a_file_that_changed_is_no_matter_of_the_device(
    theirs: Stream, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]
) -> None:
    parameter = DeviceTensor(context_of(0), tensors["w"])
    for name, tensor in lazy(checkpoint):
        if name == "w":
            file = checkpoint.files[0]
            file.write_bytes(file.read_bytes())
            with pytest.raises(FileChanged):
                tensor.copy_into(parameter)
            break
    parameter.buffer.close()


def test_other_memory_is_torchs_own_matter(checkpoint: Checkpoint) -> None:
    for name, tensor in lazy(checkpoint):
        if name == "w":
            assert not module._fill(torch.empty(512, 1024, device="meta"), tensor)
            assert not module._fill(torch.empty(2, 512, 1024), tensor)
            assert not module._fill(torch.empty(512, 1).expand(512, 1024), tensor)
            assert module._copy(torch.zeros(2, 2).to_sparse(), tensor) is None
