"""Memory that nothing has written to since it was allocated, in whole or in part."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from torch import nn  # noqa: E402

from mxcore.engine.weights import MarkUninitialised  # noqa: E402
from mxcore.engine.weights.constructed import Constructed  # noqa: E402
from mxcore.engine.weights.uninitialised import unwritten  # noqa: E402
from mxcore.errors import LayoutMismatch  # noqa: E402

PARTS = 3
SHAPES = ((PARTS,), (3 * 64, 96), (3 * 512, 768), (2, 3 * 128, 1024))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "uint8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_third_that_is_missing_is_seen_wherever_it_lies(shape: tuple[int, ...], dtype: str) -> None:
    """By rows and by columns, as kinds of quantisation fuse the parts of a layer; scales may be one number a part."""
    if shape == (PARTS,) and getattr(torch, dtype).itemsize == 1:
        shape = (8 * PARTS,)
    for dimension in range(len(shape)):
        if shape[dimension] % PARTS:
            continue
        for missing in range(PARTS):
            with MarkUninitialised():
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            whole = unwritten({"fused": tensor})["fused"]
            assert whole.pieces == whole.looked_at
            for part, view in enumerate(tensor.chunk(PARTS, dimension)):
                if part != missing:
                    view.copy_(torch.randint(1, 100, view.shape).to(view.dtype))
            found = unwritten({"fused": tensor})["fused"]
            assert found.is_more_than(None)
            assert not found.is_more_than(found)
            assert found.pieces / found.looked_at == pytest.approx(1 / PARTS, rel=0.2)


def test_what_is_written_to_is_not_named() -> None:
    with MarkUninitialised():
        tensors = {"a": torch.empty(1000, 1000), "b": torch.empty(7, dtype=torch.int8), "c": torch.empty(0)}
    for tensor in tensors.values():
        tensor.copy_(torch.randint(0, 2, tensor.shape))
    tensors["b"].fill_(2)
    assert unwritten(tensors) == {}


class Padded(nn.Module):  # type: ignore[misc]  # torch's class is Any here
    """Of its rows a checkpoint has 60; the others stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 64), requires_grad=False)


def test_padding_that_nothing_fills_may_stay_so_and_a_row_more_may_not() -> None:
    with MarkUninitialised():
        model = Padded()
    constructed = Constructed(model, torch.device("cpu"))
    model.weight[:60] = 1.0
    constructed.filled(model)
    with MarkUninitialised():
        staged = constructed.stage(torch.device("cpu"))
    model.weight[:60] = 2.0
    staged.require_filled(model)
    with MarkUninitialised():
        model.weight.copy_(torch.empty(64, 64))
    model.weight[:59] = 2.0
    with pytest.raises(LayoutMismatch, match=r"no values for 1 tensors .*'weight'"):
        staged.require_filled(model)
    staged.abandon()
