"""The weights of one model on their way, on small modules."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from torch import nn  # noqa: E402

from mxcore.engine.weights import Weights  # noqa: E402


def test_nothing_of_the_raw_weights_stays_alive_beside_processed_ones() -> None:
    model = nn.Linear(8, 8, bias=False)
    model.weight.is_transposed = True  # as some quantisations mark their parameters
    weights = Weights("processed", torch.device("cpu"))
    weights.loaded(model)
    raw = weakref.ref(model.weight)
    model.packed = model.weight.data.t().contiguous()
    del model.weight
    gc.collect()
    assert raw() is None
    weights.processed(model)
    assert [tensor.name for tensor in weights.found.tensors] == ["packed"]
