"""What is a weight, by what the constructor, loading and processing did: on small modules, at both ends."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from torch import nn  # noqa: E402

from mxcore.engine.weights import Built, Constructed, Fit, MarkUninitialised, Weights  # noqa: E402
from mxcore.engine.weights.evidence import bytes_by_name, packed_away  # noqa: E402
from mxcore.engine.weights.structure import structure_rows  # noqa: E402
from mxcore.errors import LayoutMismatch, LayoutUnsupported  # noqa: E402
from tests.engine.in_memory import received_from  # noqa: E402

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
        self.absent = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)
        self.head = nn.Parameter(torch.empty(4, 4), requires_grad=False)  # not in every checkpoint
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


def made(**options: Any) -> Layer:
    with MarkUninitialised():
        return Layer(**options)


def weights_of(model: Layer, change: Callable[[Layer], None]) -> Any:
    built = Built(model, CPU)
    change(model)
    return built.weights(built.look(model))


def named(found: Any) -> set[str]:
    return {tensor.name for tensor in found.tensors}


RAW = {"weight", "weight_again", "norm", "statistics"}


def test_only_what_loading_or_processing_wrote_and_parameters_are_weights() -> None:
    raw = weights_of(made(), load)
    assert named(raw) == RAW
    assert (raw.scalars, raw.decided, raw.refused) == ({}, {}, {})

    def both(model: Layer) -> None:
        load(model)
        process(model)

    assert named(weights_of(made(), both)) == RAW | {"packed"}


@pytest.mark.parametrize("value", [0.0, 1.0, 0.37])
def test_parameters_are_weights_whatever_a_checkpoint_has(value: float) -> None:
    assert named(weights_of(made(), lambda model: load(model, value))) - {"statistics"} == RAW - {"statistics"}


def test_a_parameter_that_nobody_wrote_is_left_aside_and_another_value_makes_it_a_weight() -> None:
    def with_head(model: Layer) -> None:
        load(model)
        model.head.data[2, 1] = 7

    assert "head" not in named(weights_of(made(), load))
    assert "head" in named(weights_of(made(), with_head))


def test_what_was_in_the_memory_before_is_no_evidence() -> None:
    """The allocator gives the old model's memory to the next one, with the very bytes that loading will write."""
    for _ in range(3):
        model = made()
        assert "head" not in named(weights_of(model, load))
        assert named(weights_of(model, load)) >= {"weight", "norm"}
        del model


WRITES: dict[str, Callable[[Any], None]] = {
    "data": lambda tensor: tensor.data.copy_(tensor + 1),
    "numpy": lambda tensor: tensor.numpy().__setitem__(slice(None), 7),
    "address": lambda tensor: ctypes.memset(tensor.data_ptr(), 7, tensor.nbytes),
    "storage": lambda tensor: tensor.set_((tensor + 1).untyped_storage(), 0, tensor.shape, tensor.stride()),
}


@pytest.mark.parametrize("how", sorted(WRITES))
def test_a_buffer_that_loading_wrote_is_a_weight_however_it_was_written(how: str) -> None:
    def write(model: Layer) -> None:
        load(model)
        WRITES[how](model.cache)

    assert named(weights_of(made(), write)) == RAW | {"cache"}


def test_what_serving_writes_into_local_tensors_is_nobodys_business() -> None:
    model = made()
    built, weights = Built(model, CPU), Weights("raw", CPU)
    load(model)
    weights.loaded(model, built)
    before = {name: tensor.clone() for name, tensor in weights.found.kept.items()}
    model.activations.fill_(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.found.kept.items())


def shared(
    source: Layer, target: Layer, kernel: type = Kernel, scale: float = 0.5, kind: Any = "processed"
) -> tuple[Weights, Weights]:
    """From one to the other; processed weights come after the target's own processing of a placeholder."""
    offered, taken = Weights(kind, CPU), Weights(kind, CPU)
    built = Built(source, CPU)
    load(source, scale)
    offered.loaded(source, built)
    process(source)
    offered.processed(source)
    built = Built(target, CPU, copies=True)
    if kind == "processed":
        load(target, 2.0**-6)
        target.cache.fill_(2.0**-6)
        taken.loaded(target, built)
        process(target, kernel)
        taken.processed(target, received_from(offered))
    else:
        taken.loaded(target, built, received_from(offered))
        process(target, kernel)
        taken.processed(target)
    return offered, taken


@pytest.mark.parametrize("kind", ["raw", "processed"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 0.0])  # the constructor's own numbers: the source has nothing to say
def test_a_target_in_other_options_has_the_weights_and_its_own_local_values(scale: float, kind: Any) -> None:
    source, target = made(), made(length=32, compiled=True)
    source.activations.fill_(5)
    offered, taken = shared(source, target, scale=scale, kind=kind)
    for name in ("weight", "norm", "statistics", "packed"):
        assert torch.equal(getattr(source, name), getattr(target, name)), name
    assert target.weight_again.data_ptr() == target.weight.data_ptr()
    assert target._scale_float == scale
    assert (target.cache.numel(), target.compiled, target._gpu_share) == (32, True, 0.5)
    assert torch.equal(target.cache, torch.arange(32).float())
    assert int(target.address) == target.weight.data_ptr()
    assert taken.scalars == offered.scalars  # who passes weights on says what it was told
    assert taken.layout == offered.layout


def test_what_the_source_has_and_this_model_lacks_is_refused_by_name_and_the_other_way_round() -> None:
    source, target = made(), made()
    source.extra_norm = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(LayoutMismatch, match="this model has no extra_norm"):
        shared(source, target, kind="raw")
    source, target = made(), made()
    target.extra_norm = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(LayoutMismatch, match="the holder's model has no extra_norm"):
        shared(source, target, kind="raw")


def test_another_form_is_refused_by_name() -> None:
    source, target = made(), made()
    target.norm = nn.Parameter(torch.ones(5), requires_grad=False)
    with pytest.raises(LayoutMismatch, match=r"norm: shape \(5,\) here, \(4,\) there"):
        shared(source, target, kind="raw")


def test_a_receive_that_failed_leaves_what_the_constructor_had_valued() -> None:
    source, target = made(), made()
    offered = Weights("raw", CPU)
    built = Built(source, CPU)
    load(source)
    source.cache.fill_(9)  # a weight there
    offered.loaded(source, built)

    def receive(fit: Fit) -> Any:
        received_from(offered)(fit)
        raise LayoutMismatch("it ended half way")

    taken = Weights("raw", CPU)
    with pytest.raises(LayoutMismatch, match="half way"):
        taken.loaded(target, Built(target, CPU), receive)
    taken.undo()
    assert torch.equal(target.cache, torch.arange(8).float())


def test_addresses_that_processing_made_are_refused() -> None:
    def write(model: Layer) -> None:
        load(model)
        model.handler = torch.tensor([model.weight.data_ptr()])
        model.counts = torch.tensor([3, 4])

    assert weights_of(made(), write).refused.keys() == {"handler"}


def test_another_kernel_is_another_structure_at_equal_shapes() -> None:
    one = structure_rows(weights_of(made(), process))
    same = structure_rows(weights_of(made(length=32, compiled=True), process))
    other = structure_rows(weights_of(made(), lambda model: process(model, OtherKernel)))
    assert one == same
    assert {name for name in other if "OtherKernel" in name} - one
    with pytest.raises(LayoutMismatch, match=r"made otherwise.*there.*Kernel.*here.*OtherKernel"):
        shared(made(), made(), OtherKernel)


def test_layers_alike_are_one_row_and_which_layer_it_was_still_counts() -> None:
    def rows(*kernels: type) -> set[str]:
        model = nn.Sequential(*(made() for _ in kernels))
        built = Built(model, CPU)
        for layer, kernel in zip(model, kernels, strict=True):
            process(layer, kernel)
        return structure_rows(built.weights(built.look(model)))

    assert len(rows(Kernel, Kernel)) == len(rows(Kernel, Kernel, Kernel))
    assert rows(Kernel, OtherKernel) != rows(OtherKernel, Kernel)


@pytest.mark.parametrize("decision", [True, "vec", torch.int8, 3])
def test_what_a_processing_step_decides_is_structure(decision: Any) -> None:
    def decide(model: Layer) -> None:
        process(model)
        model.decision = decision

    assert structure_rows(weights_of(made(), decide)) != structure_rows(weights_of(made(), process))


def test_a_function_that_processing_made_is_structure() -> None:
    def with_function(function: Callable[[], None]) -> set[str]:
        def decide(model: Layer) -> None:
            process(model)
            model.call = function

        return structure_rows(weights_of(made(), decide))

    one, other = (
        with_function(lambda: None),
        with_function(lambda: None),
    )
    assert one != other  # of two places


def test_an_unused_tensor_that_a_kernel_empties_is_no_reason_and_a_packed_one_is() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].qzeros = nn.Parameter(torch.zeros(8), requires_grad=False)
    built = Built(model, CPU)
    before = bytes_by_name(built.look(model))
    model[0].qzeros = nn.Parameter(torch.empty(0), requires_grad=False)
    assert packed_away(before, built.look(model)) == {}
    model[1].weight = nn.Parameter(torch.empty(0), requires_grad=False)
    assert list(packed_away(before, built.look(model))) == ["1.weight"]


class Handle:
    """Owns memory that nobody can see."""

    def __del__(self) -> None:
        pass


def test_only_opaque_objects_that_came_after_construction_are_refused() -> None:
    model = made()
    model.workspace_of_the_constructor = Handle()
    built = Built(model, CPU)
    model.packed_copy = Handle()
    assert list(built.weights(built.look(model)).refused) == ["packed_copy"]
    first, model.workspace_of_the_constructor = model.workspace_of_the_constructor, Handle()
    assert set(built.weights(built.look(model)).refused) == {"packed_copy", "workspace_of_the_constructor"}
    del first


def test_a_parameter_that_is_elsewhere_is_refused_though_the_constructor_put_it_there() -> None:
    """Weights that an engine offloads to host memory are weights."""
    model = made()
    model.offloaded = nn.Parameter(torch.ones(65), requires_grad=False)
    model.table = torch.ones(65)
    built = Built(model, torch.device("cuda", 0))
    assert set(built.weights(built.look(model)).refused) == {"offloaded"}
    model.table[3] = 2
    assert set(built.weights(built.look(model)).refused) == {"offloaded", "table"}


def test_nothing_of_the_raw_weights_stays_alive_beside_processed_ones() -> None:
    model = made()
    model.weight.is_transposed = 1.0  # an attribute of the parameter, as some quantisations have
    built, weights = Built(model, CPU), Weights("processed", CPU)
    load(model)
    weights.loaded(model, built)
    raw = weakref.ref(model.weight)
    process(model)
    del model.weight, model.weight_again
    gc.collect()
    assert raw() is None
    weights.processed(model)
    assert "packed" in named(weights.found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_the_pattern_is_seen_in_every_type_and_nearly_nothing(dtype: torch.dtype) -> None:
    with MarkUninitialised():
        tensors = {
            "one": torch.empty(1, dtype=dtype),
            "odd": torch.empty(3, 5, dtype=dtype),
            "like": torch.empty_like(torch.zeros(9, dtype=dtype)),
            "strided": torch.empty_strided((4, 2), (1, 4), dtype=dtype),
            "view": torch.empty(64, dtype=dtype)[13:],
            "none": torch.empty(0, dtype=dtype),
            "valued": torch.ones(8, dtype=dtype),
        }
    built = Built(nn.ParameterDict({name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}), CPU)
    assert built._unwritten == tensors.keys() - {"none", "valued"}
    assert all(float(tensor.float().abs().max()) < 1.5 for tensor in tensors.values() if tensor.numel())


class Drafting(Layer):
    """Its flags say what of it the checkpoint has, as flags of drafts do; an engine looks at them after loading."""

    has_own_head = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.has_mask = False


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_a_flag_that_loading_set_comes_with_the_weights(kind: Any) -> None:
    """`load` at the target has no tensors, so that only the source can know."""

    def load_with_head(model: Layer) -> None:
        load(model)
        model.has_own_head = model.inner.has_mask = True

    with MarkUninitialised():
        source, target = Drafting(), Drafting()
    offered, taken = Weights(kind, CPU), Weights(kind, CPU)
    offered.loaded(source, _filled(source, load_with_head))
    process(source)
    offered.processed(source)
    built = Built(target, CPU, copies=True)
    receive = received_from(offered)
    if kind == "raw":
        taken.loaded(target, built, receive)
        assert target.has_own_head  # before processing
        assert target.inner.has_mask
    else:
        taken.loaded(target, built)
        process(target)
        taken.processed(target, receive)
    assert target.has_own_head
    assert target.inner.has_mask
    assert taken.scalars == offered.scalars  # who passes on says so too
    assert not made().compiled


def test_a_flag_that_is_none_of_this_model_is_refused_by_name() -> None:
    def load_with_head(model: Layer) -> None:
        load(model)
        model.has_own_head = model.forward = True

    offered, taken, target = Weights("raw", CPU), Weights("raw", CPU), made()
    source = made()
    offered.loaded(source, _filled(source, load_with_head))
    with pytest.raises(LayoutMismatch, match="'forward' at the holder, which this Layer lacks"):
        taken.loaded(target, Built(target, CPU), received_from(offered))


def _filled(model: Layer, fill: Callable[[Layer], None]) -> Built:
    built = Built(model, CPU)
    fill(model)
    return built


class Finishing(Layer):
    """Makes a tensor of another at the end of its loading, as DeepSeek V4 does."""

    def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            getattr(self, name).data.copy_(tensor)
        self.broadcast = self.weight.data.sum(0)


def test_what_is_made_at_the_end_of_loading_comes_with_the_weights() -> None:
    with MarkUninitialised():
        source, target, unfinished = Finishing(), Finishing(), Finishing()
    offered = Weights("raw", CPU)
    tensors = {"weight": torch.full((4, 4), 0.5)}
    offered.loaded(source, _filled(source, lambda model: model.load_weights(tensors)))
    built = Built(target, CPU, copies=True)
    target.load_weights({})  # as `Engine.finish_filling` does
    taken = Weights("raw", CPU)
    taken.loaded(target, built, received_from(offered))
    assert torch.equal(target.broadcast, source.broadcast)
    with pytest.raises(LayoutMismatch, match="this model has no broadcast"):
        Weights("raw", CPU).loaded(unfinished, Built(unfinished, CPU, copies=True), received_from(offered))


def test_what_cannot_be_moved_is_refused_by_name() -> None:
    model = made()
    built, weights = Built(model, CPU), Weights("raw", CPU)
    load(model)
    model.sparse = torch.eye(3).to_sparse()
    with pytest.raises(LayoutUnsupported, match="sparse"):
        weights.loaded(model, built)


class Tabled(nn.Module):
    """A matrix, and what its constructor values: a norm, a table, and rows that are no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("table", torch.arange(8).float(), persistent=False)
        self.rows = torch.arange(6).float()


def test_what_a_constructor_valued_is_kept_once() -> None:
    """For as long as a model runs: by how it is made, and by what of it is a weight."""
    with MarkUninitialised():
        model = Tabled()
    noted = Constructed(model, CPU)
    values = {form.value.data_ptr() for form in noted._forms.values() if form.value is not None}
    copies = noted.built._copies
    assert len(values) == 2
    assert copies["table"].data_ptr() in values
    assert copies["rows"].data_ptr() not in values | {model.rows.data_ptr()}
    for tensor in (model.table, model.rows):
        tensor.zero_()
    noted.built.put_back(noted.built.look(model), set(), {})
    assert model.table.tolist() == list(range(8))
    assert model.rows.tolist() == list(range(6))
    model.table.zero_()
    noted.stage(CPU)
    assert model.table.tolist() == list(range(8))
