"""Lazy tensors: what loaders do with them gives what ordinary tensors give, and reads no more than is taken."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from mxcore.engine import lazy_weights
from mxcore.engine.lazy_tensors import LazyTensor
from mxcore.errors import FileChanged
from mxcore.reading import checkpoint_reader
from mxcore.storage.checkpoint import Checkpoint
from tests.storage.conftest import Maker, Tensors, same


@pytest.fixture(scope="module")
def written() -> Tensors:
    torch.manual_seed(5)
    return {"w": torch.randn(64, 48), "e": torch.randn(4, 32, 16).bfloat16(), "s": torch.randn(3)}


@pytest.fixture
def checkpoint(made: Maker, written: Tensors) -> Checkpoint:
    return made(written)


def lazies(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(lazy_weights(checkpoint, lazy_least_bytes=100))


OPERATIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "narrow": lambda t: t.narrow(0, 1, 2),
    "negative narrow": lambda t: t.narrow(-1, -4, 3),
    "slice": lambda t: t[1:3],
    "slice of a slice": lambda t: t[1:, 2:][1:2, :5],
    "step": lambda t: t[::2],
    "index": lambda t: t[2],
    "negative index": lambda t: t[-1],
    "ellipsis": lambda t: t[..., 3:7],
    "new axis": lambda t: t[None, 0],
    "mask": lambda t: t[torch.tensor([0, 2])],
    "transpose": lambda t: t.t() if t.dim() == 2 else t.transpose(1, 2),
    "chunk": lambda t: t.chunk(2)[1],
    "split": lambda t: torch.split(t, 3)[0],
    "unbind": lambda t: t.unbind()[1],
    "iterate": lambda t: list(t)[3],
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(2, -1),
    "bytes": lambda t: t.view(torch.uint8),
    "to": lambda t: t.to(torch.float64),
    "contiguous": lambda t: t.contiguous(),
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "arithmetic": lambda t: (t * 2 + 1).float(),
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack((t, t)),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "expand": lambda t: t[:1].expand(5, *t.shape[1:]),
    "pad": lambda t: torch.nn.functional.pad(t, (0, 1)),
    "numpy": lambda t: torch.from_numpy(t.float().numpy()),
    "list": lambda t: torch.tensor(t.tolist()),
    "empty": lambda t: t[1:1],
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["w", "e"])
def test_any_operation_gives_the_same(checkpoint: Checkpoint, written: Tensors, name: str, operation: str) -> None:
    function = OPERATIONS[operation]
    expected, got = function(written[name]), function(lazies(checkpoint)[name])
    assert isinstance(expected, torch.Tensor)
    assert isinstance(got, torch.Tensor)
    assert got.shape == expected.shape
    assert got.is_contiguous() or not expected.is_contiguous()
    there = torch.zeros_like(expected)
    there.copy_(got)
    assert same(there, expected)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "whole": lambda t: t.mul_(2),
    "part": lambda t: t[1:3].mul_(2),
    "part of a part": lambda t: t[1:][0:2, 3:].add_(1),
    "index": lambda t: t[1].zero_(),
    "assigned": lambda t: t.__setitem__(slice(0, 2), t[2:4] * 2),
    "assigned a part that is not read": lambda t: t.__setitem__(slice(0, 2), t[2:4]),
    "data": lambda t: t.data.mul_(2),
    "data's part": lambda t: t.detach()[2].fill_(3),
    "result": lambda t: torch.add(t[:2], 1, out=t[2:4]),
    "part that was looked at": lambda t: (part := t[1:3], part.sum(), part.mul_(2)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["w", "e"])
def test_what_is_written_to_a_part_is_in_the_whole(
    checkpoint: Checkpoint, written: Tensors, name: str, write: str
) -> None:
    lazy, ordinary = lazies(checkpoint)[name], written[name].clone()
    part = lazy[1:3]
    WRITES[write](lazy)
    WRITES[write](ordinary)
    assert same(part + 0, ordinary[1:3])  # cut out before
    to = torch.zeros_like(ordinary)
    to.copy_(lazy)
    assert same(to, ordinary)


def test_what_a_tensor_says_of_itself(checkpoint: Checkpoint, written: Tensors) -> None:
    for name, tensor in lazies(checkpoint).items():
        real = written[name]
        assert (tensor.shape, tensor.dtype, tensor.device, tensor.dim()) == (
            real.shape,
            real.dtype,
            real.device,
            real.dim(),
        )
        assert (tensor.numel(), tensor.nbytes, tensor.stride()) == (real.numel(), real.nbytes, real.stride())
        assert isinstance(tensor, LazyTensor) == (name != "s")


def test_a_part_goes_straight_into_the_parameter(checkpoint: Checkpoint, written: Tensors) -> None:
    for name, tensor in lazy_weights(checkpoint, lazy_least_bytes=100, mode="buffered"):
        if name != "w":
            continue
        assert isinstance(tensor, LazyTensor)
        parameter = torch.nn.Parameter(torch.zeros(64, 24), requires_grad=False)
        parameter.data.copy_(tensor.narrow(1, 24, 24))
        assert same(parameter.data, written["w"][:, 24:])
        assert tensor._source.read_bytes == parameter.nbytes
        assert not tensor.has_been_read
        fused = torch.zeros(128, 48)
        fused.narrow(0, 64, 64).copy_(tensor)
        assert same(fused[64:], written["w"])
        assert "not read" in repr(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_converted(checkpoint: Checkpoint, written: Tensors, dtype: torch.dtype) -> None:
    there = torch.zeros(64, 48, dtype=dtype)
    there.copy_(lazies(checkpoint)["w"])
    assert same(there, written["w"].to(dtype))


def test_broadcast_and_wrong_shapes_are_torchs_own(checkpoint: Checkpoint, written: Tensors) -> None:
    tensor = lazies(checkpoint)["w"]
    there = torch.zeros(2, 64, 48)
    there.copy_(tensor)
    assert same(there[1], written["w"])
    with pytest.raises(RuntimeError):
        torch.zeros(5, 5).copy_(tensor)
    with pytest.raises(IndexError):
        tensor[64]


def test_memory_is_asked_for(checkpoint: Checkpoint, written: Tensors) -> None:
    tensor = lazies(checkpoint)["w"]
    assert tensor.data_ptr() == tensor.data_ptr() != 0
    assert tensor.untyped_storage().nbytes() == written["w"].nbytes
    assert (tensor.numpy() == written["w"].numpy()).all()
    assert isinstance(tensor, LazyTensor)
    assert tensor.has_been_read


def test_what_we_fail_to_read_is_safetensors_matter(
    checkpoint: Checkpoint, written: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a way to read that is forced and does not work here."""
    names = {}
    for name, tensor in lazy_weights(checkpoint, lazy_least_bytes=100, mode="uring"):
        names[name] = torch.zeros_like(written[name])
        with patch.object(checkpoint_reader, "uring_refused", return_value=errno.EPERM):
            names[name].copy_(tensor)
    assert all(same(names[name], written[name]) for name in written)
    assert "io_uring is not allowed here" in caplog.text
    assert "read with safetensors instead" in caplog.text


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_changes_under_a_load_is_an_error(checkpoint: Checkpoint, first: bool) -> None:
    """Also one that becomes the same again: nobody can tell a model that is half of each from a right one."""
    weights = lazy_weights(checkpoint, lazy_least_bytes=100)
    if not first:
        next(weights)
    file = checkpoint.files[0]
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(0, 1_000_000_000))
    with pytest.raises(FileChanged, match="load again once it is complete"):
        {name: tensor.clone() for name, tensor in weights}


def test_the_bytes_are_there_when_a_copy_returns(checkpoint: Checkpoint, written: Tensors) -> None:
    """vLLM's `composed_weight_loader` reads the parameter in the next line: no copy is put off to go with others."""
    for name, tensor in lazy_weights(checkpoint, lazy_least_bytes=100):
        parameter = torch.nn.Parameter(torch.full(tensor.shape, float("nan"), dtype=tensor.dtype))
        parameter.data.copy_(tensor)
        parameter.data.copy_(torch.exp(parameter))
        assert same(parameter.data, torch.exp(written[name])), name
