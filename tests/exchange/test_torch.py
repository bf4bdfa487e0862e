"""Tensors and modules of torch: types that numpy lacks, tied and transposed ones, into and out of modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="these are torch's tensors")

from torch import nn  # noqa: E402

from mxcore import fetch, publish  # noqa: E402
from mxcore.errors import LayoutMismatch, LayoutUnsupported  # noqa: E402


class Tied(nn.Module):
    """An embedding that is also the head, a normalisation with a buffer, an 8-bit parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(100, 32, _weight=torch.rand(100, 32, generator=generator))
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(32)
        self.norm.running_mean.copy_(torch.rand(32, generator=generator))
        scale = torch.rand(16, 16, generator=generator)
        self.halves = nn.Parameter(scale.bfloat16().t(), requires_grad=False)
        self.eighths = nn.Parameter(scale.to(torch.float8_e4m3fn), requires_grad=False)


def assert_equal(found: Any, wanted: Any) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_module_becomes_tensors_and_another_module(at: dict[str, Any], name: str) -> None:
    source, target = Tied(1), Tied(2)
    with publish(name, source, 1, **at) as published:
        unique = sum({tensor.data_ptr(): tensor.nbytes for tensor in source.state_dict().values()}.values())
        assert published.total_bytes == unique  # the tied one travels once
        found = fetch(name, 1, **at)
        assert_equal(found, source.state_dict())
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
        assert found["halves"].stride() == source.halves.stride()
        fetch(name, 1, into=target, **at)
        fetch(name, 1, into=nn.ModuleDict({"embed": nn.Embedding(100, 32)}), names=["embed.weight"], **at)
    assert_equal(target.state_dict(), source.state_dict())
    assert target.head.weight is target.embed.weight


def test_numpy_takes_them_as_bytes_where_it_has_no_such_type(at: dict[str, Any], name: str) -> None:
    source = Tied(3)
    with publish(name, source, 1, copy=True, **at):
        found = fetch(name, 1, framework="numpy", **at)
    np.testing.assert_array_equal(found["norm.running_mean"], source.norm.running_mean.numpy())
    assert found["halves"].tobytes() == source.halves.t().contiguous().view(torch.uint8).numpy().tobytes()
    assert found["eighths"].dtype == np.uint8


def test_what_numpy_publishes_torch_fetches_into_its_own(at: dict[str, Any], name: str) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"a": torch.zeros(3, 4, requires_grad=True)}
    with publish(name, {"a": array}, 1, **at):
        fetch(name, 1, into=tensors, **at)
        with pytest.raises(LayoutMismatch, match=r"a: torch.bfloat16 \(3, 4\) here, torch.float32 \(3, 4\) there"):
            fetch(name, 1, into={"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, **at)
    np.testing.assert_array_equal(tensors["a"].detach().numpy(), array)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.zeros(3, device="meta"), "on the meta device"),
        (lambda: torch.eye(3).to_sparse(), "its memory is opaque"),
        (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "to be conjugated"),
        (lambda: torch.zeros(3, dtype=torch.complex128), "dtype torch.complex128"),
        (lambda: torch.zeros(4, 4)[:, :2], "gaps between its elements"),
    ],
)
def test_tensors_that_cannot_be_published_are_named(at: dict[str, Any], name: str, tensor: Any, said: str) -> None:
    with pytest.raises(LayoutUnsupported, match=rf"'a' \(.*{said}"):
        publish(name, {"a": tensor(), "b": torch.zeros(1)}, 1, **at)
