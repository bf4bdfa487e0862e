"""What is a weight, by what the constructor, loading and processing did: on small modules, at both ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from torch import nn  # noqa: E402

from mxcore.engine.collect import collect  # noqa: E402
from mxcore.engine.evidence import Built, bytes_by_name, packed_away, structure_rows  # noqa: E402
from mxcore.engine.weights import Receive, Weights  # noqa: E402
from mxcore.errors import LayoutUnsupported  # noqa: E402
from mxcore.transfer.layout import STRUCTURE_PREFIX  # noqa: E402

CPU = torch.device("cpu")


class Kernel:
    """Decides how bytes are laid out."""


class OtherKernel:
    """Another one."""


class Layer(nn.Module):
    """A weight, a norm, a cache that depends on an option, an activation buffer, flags, a number, and an address."""

    def __init__(self, *, length: int = 8, compiled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("statistics", torch.zeros(4))
        self.register_buffer("cache", torch.arange(length).float(), persistent=False)
        self.activations = torch.zeros(length, 4)
        self.weight_again = self.weight.data.view(16)
        self.address = torch.tensor([self.weight.data_ptr()])
        self.absent = torch.empty(4, device="meta")
        self.compiled = compiled
        self._scale_float = 1.0
        self._gpu_share = 0.5 if compiled else 0.9
        self.kernel: Any = None


def load(model: Layer, value: float = 0.5) -> None:
    for tensor in (model.weight, model.norm, model.statistics):
        tensor.data.copy_(torch.full_like(tensor, value))


def process(model: Layer, kernel: type = Kernel) -> None:
    model.packed = model.weight.data.t().contiguous()
    model._scale_float = float(model.weight.abs().max())
    model.kernel = kernel()


def weights_of(model: Layer, change: Callable[[Layer], None]) -> Any:
    built = Built(model, CPU)
    change(model)
    return built.weights(collect(model, CPU))


def received_from(source: Weights) -> Receive:
    """Memory to memory, as a transfer would."""

    def receive(layout: Any, placement: Any, numbers: Mapping[str, float]) -> Any:
        import ctypes

        assert source.layout is not None
        assert source.placement is not None
        assert layout.fingerprint == source.layout.fingerprint
        assert source.scalars.keys() <= numbers.keys()
        for to, come, size in zip(placement.addresses, source.placement.addresses, layout.extent_bytes, strict=True):
            ctypes.memmove(to, come, size)
        return SimpleNamespace(scalars=dict(source.scalars))

    return receive


def test_only_what_a_checkpoint_can_have_and_what_processing_made_is_a_weight() -> None:
    raw = weights_of(Layer(), load)
    assert {tensor.name for tensor in raw.tensors} == {"weight", "weight_again", "norm", "statistics"}
    assert (raw.scalars, raw.decided, raw.refused) == ({}, {}, {})
    processed = weights_of(Layer(), process)
    assert {tensor.name for tensor in processed.tensors} == {"weight", "weight_again", "norm", "statistics", "packed"}


@pytest.mark.parametrize("value", [0.0, 1.0, 0.37])
def test_the_set_does_not_depend_on_the_checkpoints_values(value: float) -> None:
    named = {tensor.name for tensor in weights_of(Layer(), lambda model: load(model, value)).tensors}
    assert named == {"weight", "weight_again", "norm", "statistics"}


WRITES: dict[str, Callable[[Any], None]] = {
    "data": lambda tensor: tensor.data.copy_(tensor + 1),
    "numpy": lambda tensor: tensor.numpy().__setitem__(slice(None), 7),
    "storage": lambda tensor: tensor.set_((tensor + 1).untyped_storage(), 0, tensor.shape, tensor.stride()),
}


@pytest.mark.parametrize("how", sorted(WRITES))
def test_a_local_tensor_that_something_wrote_is_named_and_nothing_is_offered(how: str) -> None:
    model = Layer()
    built, weights = Built(model, CPU), Weights("raw", CPU)
    load(model)
    WRITES[how](model.cache)
    with pytest.raises(LayoutUnsupported, match="cache"):
        weights.loaded(model, built)


def test_what_serving_writes_into_local_tensors_is_nobodys_business() -> None:
    model = Layer()
    built, weights = Built(model, CPU), Weights("raw", CPU)
    load(model)
    weights.loaded(model, built)
    before = {name: tensor.clone() for name, tensor in weights.found.kept.items()}
    model.activations.fill_(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.found.kept.items())


def shared(source: Layer, target: Layer, kernel: type = Kernel, scale: float = 0.5) -> tuple[Weights, Weights]:
    """Processed weights from one to the other, whose own processing sees a placeholder."""
    offered, taken = Weights("processed", CPU), Weights("processed", CPU)
    built = Built(source, CPU)
    load(source, scale)
    offered.loaded(source, built)
    process(source)
    offered.processed(source)
    built = Built(target, CPU, copies=True)
    load(target, 2.0**-6)
    taken.loaded(target, built)
    process(target, kernel)
    taken.processed(target, received_from(offered))
    return offered, taken


@pytest.mark.parametrize("scale", [0.5, 1.0])  # 1.0 is the constructor's own number: the source has nothing to say
def test_a_target_in_other_options_has_the_weights_and_its_own_local_values(scale: float) -> None:
    source, target = Layer(), Layer(length=32, compiled=True)
    source.activations.fill_(5)
    offered, taken = shared(source, target, scale=scale)
    for name in ("weight", "norm", "statistics", "packed"):
        assert torch.equal(getattr(source, name), getattr(target, name)), name
    assert target.weight_again.data_ptr() == target.weight.data_ptr()
    assert target._scale_float == scale
    assert (target.cache.numel(), target.compiled, target._gpu_share) == (32, True, 0.5)
    assert int(target.address) == target.weight.data_ptr()
    assert taken.scalars == offered.scalars  # who passes weights on says what it was told


def test_what_a_placeholder_did_to_local_values_is_put_back() -> None:
    target = Layer()
    built = Built(target, CPU, copies=True)
    target.cache.fill_(2.0**-6)
    target._gpu_share = 0.1
    built.put_back(collect(target, CPU), {})
    assert torch.equal(target.cache, torch.arange(8).float())
    assert target._gpu_share == 0.9


def test_another_kernel_is_another_structure_at_equal_shapes() -> None:
    one = structure_rows(weights_of(Layer(), process))
    same = structure_rows(weights_of(Layer(length=32, compiled=True), process))
    other = structure_rows(weights_of(Layer(), lambda model: process(model, OtherKernel)))
    assert one == same
    assert {name for name in other if "OtherKernel" in name} - one.keys()
    assert all(name.startswith(STRUCTURE_PREFIX) for name in one)


def test_layers_alike_are_one_row_and_which_layer_it_was_still_counts() -> None:
    def rows(*kernels: type) -> dict[str, float]:
        model = nn.Sequential(*(Layer() for _ in kernels))
        built = Built(model, CPU)
        for layer, kernel in zip(model, kernels, strict=True):
            process(layer, kernel)
        return structure_rows(built.weights(collect(model, CPU)))

    assert len(rows(Kernel, Kernel)) == len(rows(Kernel, Kernel, Kernel))
    assert rows(Kernel, OtherKernel) != rows(OtherKernel, Kernel)


def test_what_a_processing_step_decides_is_structure() -> None:
    def decide(model: Layer) -> None:
        process(model)
        model.interleaved = True

    assert structure_rows(weights_of(Layer(), decide)) != structure_rows(weights_of(Layer(), process))


def test_an_unused_tensor_that_a_kernel_empties_is_no_reason_and_a_packed_one_is() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].qzeros = nn.Parameter(torch.zeros(8), requires_grad=False)
    before = bytes_by_name(collect(model, CPU))
    model[0].qzeros = nn.Parameter(torch.empty(0), requires_grad=False)
    assert packed_away(before, collect(model, CPU)) == {}
    model[1].weight = nn.Parameter(torch.empty(0), requires_grad=False)
    assert list(packed_away(before, collect(model, CPU))) == ["1.weight"]


def test_only_opaque_objects_that_came_after_construction_are_refused() -> None:
    class Handle:
        def __del__(self) -> None:
            pass

    model = Layer()
    model.workspace_of_the_constructor = Handle()
    built = Built(model, CPU)
    model.packed_copy = Handle()
    assert list(built.weights(collect(model, CPU)).refused) == ["packed_copy"]


def test_nothing_of_the_raw_weights_stays_alive_beside_processed_ones() -> None:
    model = Layer()
    model.weight.is_transposed = 1.0  # an attribute of the parameter, as some quantisations have
    built, weights = Built(model, CPU), Weights("processed", CPU)
    load(model)
    weights.loaded(model, built)
    raw = weakref.ref(model.weight)
    process(model)
    del model.weight, model.weight_again
    weights.processed(model)
    gc.collect()
    assert raw() is None
