"""A torch model → tensors and scalars: every place that a weight can be in, on small modules."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import mmap
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import fx, nn

from mxcore.engine.weights import Built
from mxcore.engine.weights.collect import MAXIMUM_DEPTH, Collected, collect, shown
from mxcore.errors import LayoutMismatch, LayoutUnsupported
from mxcore.transfer.layout import build_layout

CPU = torch.device("cpu")


def names(found: Collected) -> list[str]:
    return [tensor.name for tensor in found.tensors]


class Slotted:
    __slots__ = ("inner", "scale")

    def __init__(self) -> None:
        self.inner = torch.ones(2)
        self.scale = 0.5


@dataclass
class Helper:
    weight: torch.Tensor = field(default_factory=lambda: torch.ones(3))
    factor: float = 0.25
    back: Any = None


@dataclass(frozen=True)
class Frozen:
    factor: float = 0.25


class Pair(NamedTuple):
    weight: torch.Tensor
    factor: float


def test_parameters_and_both_kinds_of_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].register_buffer("derived", torch.zeros(4), persistent=False)
    found = collect(model, CPU)
    assert set(names(found)) >= {"0.weight", "0.bias", "0.derived", "1.running_mean", "1.num_batches_tracked"}
    assert found.refused == {}


def test_plain_attributes_and_helper_objects() -> None:
    model = nn.Linear(1, 1)
    model.plain = torch.ones(2)
    model.helper = Helper()
    model.slotted = Slotted()
    model.listed = [torch.ones(1), {"deep": (torch.ones(1),)}]
    found = collect(model, CPU)
    expected = {"plain", "helper.weight", "slotted.inner", "listed[0]", "listed[1]['deep'][0]"}
    assert set(names(found)) == {"weight", "bias", *expected}
    assert found.scalars["helper.factor"] == 0.25
    assert found.scalars["slotted.scale"] == 0.5


def test_attributes_of_parameters_and_modules_outside_of_the_tree() -> None:
    model = nn.Linear(1, 1)
    model.weight.quant_state = {0: Helper()}
    model.hidden = [nn.Linear(1, 1, bias=False)]
    found = collect(model, CPU)
    assert {"weight.quant_state[0].weight", "hidden[0].weight"} <= set(names(found))


def test_a_module_of_the_tree_is_named_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].neighbour = [model[1]]
    model[1].parents = {"model": model}
    assert names(collect(model, CPU)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_cycles_end() -> None:
    model = nn.Linear(1, 1)
    one, two = Helper(), Helper()
    one.back, two.back = two, one
    model.helper = one
    model.itself = [model]
    assert {"helper.weight", "helper.back.weight"} <= set(names(collect(model, CPU)))


def test_too_deep_is_refused_not_left_out() -> None:
    model = nn.Linear(1, 1)
    value: Any = torch.ones(1)
    for _ in range(MAXIMUM_DEPTH + 2):
        value = [value]
    model.nested = value
    found = collect(model, CPU)
    (reason,) = found.refused.values()
    assert "nested deeper" in reason


def test_scratch_memory_goes_by_its_name() -> None:
    """Nothing else would tell: made by processing as a weight is, and written by kernels after it was looked at."""
    model = nn.Linear(1, 1)
    built = Built(model, CPU)
    model.register_buffer("workspace", torch.zeros(100))
    model.another = torch.zeros(100)
    assert names(built.weights(built.look(model))) == ["weight", "bias", "another"]


def test_a_cache_is_as_the_constructor_left_it() -> None:
    """vLLM's KV cache is empty until the engine has its weights: it needs no name."""
    model = nn.Linear(1, 1)
    model.kv_cache = [torch.tensor([])]
    model.register_buffer("other_cache", torch.ones(100))
    built = Built(model, CPU)
    assert names(built.weights(built.look(model))) == ["weight", "bias"]


def test_what_leads_out_of_the_model_is_not_followed() -> None:
    """Compiled code has the model's weights under other names; a logger knows all others, whatever was imported."""
    model = nn.Sequential(nn.Linear(1, 1))
    model.runs = fx.Interpreter(fx.symbolic_trace(model[0]))
    model.log = logging.getLogger("a model's")
    found = collect(model, CPU)
    assert names(found) == ["0.weight", "0.bias"]
    assert set(found.classes) == {"", "0"}


def test_names_and_order_do_not_depend_on_the_order_of_attributes() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    one.first, one.second = torch.ones(1), torch.ones(2)
    other.second, other.first = torch.ones(2), torch.ones(1)
    assert names(collect(one, CPU)) == names(collect(other, CPU))


def test_tied_and_strided_tensors_by_storage_and_offset() -> None:
    model = nn.Module()
    base = torch.arange(24, dtype=torch.int32)
    model.register_buffer("base", base)
    model.view = base[4:16].view(3, 4).t()
    model.again = base
    found = collect(model, CPU)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    view = by_name["view"]
    assert (view.shape, view.stride, view.dtype) == ((4, 3), (1, 4), "torch.int32")
    assert view.address == base.data_ptr() + 16
    assert view.storage_address == by_name["again"].storage_address == base.untyped_storage().data_ptr()
    assert sum({tensor.storage_address: tensor.storage_bytes for tensor in found.tensors}.values()) == 96
    layout, placement = build_layout("raw", found.tensors)
    assert layout.extent_bytes == (96,)
    assert placement.addresses == (base.data_ptr(),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.float64])
def test_addresses_and_bytes_are_the_tensors_own(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.tensor = torch.zeros(5, 7).to(dtype)
    (local,) = collect(model, CPU).tensors
    assert local.itemsize_bytes == dtype.itemsize
    assert local.storage_bytes == 35 * dtype.itemsize
    ctypes.memset(local.address, 1, local.storage_bytes)
    assert bool((model.tensor.view(torch.uint8) == 1).all())


def test_empty_and_scalar_tensors() -> None:
    model = nn.Module()
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("one", torch.tensor(1.5))
    shapes = {tensor.name: tensor.shape for tensor in collect(model, CPU).tensors}
    assert shapes == {"none": (0,), "one": ()}


def test_meta_tensors_and_opaque_memory_are_refused_by_name() -> None:
    model = nn.Module()
    model.meta = torch.empty(2, device="meta")
    model.sparse = torch.eye(3).to_sparse()
    found = collect(model, CPU)
    assert {"meta", "sparse"} <= set(found.refused)
    with pytest.raises(LayoutUnsupported, match=r"meta \(on the meta device"):
        found.require_movable()


def test_small_host_tensors_beside_an_accelerator_travel_as_scalars() -> None:
    model = nn.Module()
    model.host_scale = torch.tensor([1.5, 2.5])
    model.large = torch.ones(1000)
    found = collect(model, torch.device("cuda", 0))
    assert found.scalars == {"host_scale[0]": 1.5, "host_scale[1]": 2.5}
    assert list(found.refused) == ["large"]
    found.set_scalars({"host_scale[0]": 1.5, "host_scale[1]": 4.0})
    assert model.host_scale.tolist() == [1.5, 4.0]


def test_a_function_that_closes_over_a_weight_of_its_own_is_refused() -> None:
    model = nn.Linear(1, 1)
    packed = torch.ones(4)
    model.matmul = lambda x: x @ packed
    model.partial = functools.partial(torch.add, other=torch.ones(2))
    found = collect(model, CPU)
    assert set(found.refused) == {"matmul", "partial"}
    assert "matmul.packed" in found.refused["matmul"]


def test_a_function_over_a_named_weight_is_fine() -> None:
    model = nn.Linear(1, 1)
    weight = model.weight
    model.matmul = lambda x: x @ weight
    model.bound = model.forward
    model.plain = torch.nn.functional.linear
    assert collect(model, CPU).refused == {}


def test_bytes_that_hang_on_the_configuration_are_not_walked_one_by_one() -> None:
    """An engine's processes share a ring of hundreds of MB, by a view that is a sequence of numbers."""
    with mmap.mmap(-1, 1 << 28) as memory, memoryview(memory) as ring:
        groups = SimpleNamespace(ring=ring, slots=[ring[:8], bytearray(8)])
        model = nn.Linear(2, 2)
        model.group = groups
        most_bytes = tracemalloc_peak(functools.partial(collect, model, CPU, [groups]))
        groups.slots[0].release()
    assert most_bytes < 1 << 24


def tracemalloc_peak(run: Callable[[], object]) -> int:
    """The most bytes of Python's that it held at once."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_hangs_on_the_configuration_is_left_out_and_modules_that_it_lists_are_not() -> None:
    model, layer = nn.Module(), nn.Linear(2, 2)
    cache = Helper()
    configuration = SimpleNamespace(cache=cache, layers={"x": layer}, nested=[{"share": Helper()}])
    model.configuration, model.cache, model.share = configuration, cache, configuration.nested[0]["share"]
    model.layer = layer
    found = collect(model, CPU, [configuration])
    assert {name.split(".")[0] for name in found.classes} == {"", "layer"}
    assert names(found) == ["layer.weight", "layer.bias"]


def test_an_object_that_frees_memory_of_its_own_is_refused() -> None:
    class Handle:
        def __init__(self) -> None:
            self.pointer = torch.tensor(0x7F0000000000)

        def __del__(self) -> None:
            pass

    model = nn.Linear(1, 1)
    model.handle = Handle()
    found = collect(model, CPU)
    assert "owns memory" in found.refused["handle"]
    assert "handle.pointer" not in names(found)


def test_floats_are_numbers_and_what_was_decided_is_structure() -> None:
    model = nn.Module()
    model._k_scale_float = 2.0
    model.calculate = True
    model.heads = 8
    model.text = "x"
    found = collect(model, CPU)
    assert found.scalars == {"_k_scale_float": 2.0}
    assert found.decided == {"calculate": "True", "text": "'x'", "heads": "8"}
    assert found.classes == {"": "torch.nn.modules.module.Module"}


def test_scalars_are_put_back_where_they_came_from() -> None:
    model = nn.Module()
    model._k_scale_float = 2.0
    model.helper = Helper()
    model.listed = [1.0, {"deep": 2.0}]
    found = collect(model, CPU)
    values = {name: value + 1 for name, value in found.scalars.items()}
    found.set_scalars(values)
    assert (model._k_scale_float, model.helper.factor, model.listed) == (3.0, 1.25, [2.0, {"deep": 3.0}])
    assert collect(model, CPU).scalars == values


@pytest.mark.parametrize("owner", [(0.25, 1), Frozen(), Pair(torch.ones(1), 0.25)])
def test_scalars_that_cannot_be_set_must_be_equal(owner: Any) -> None:
    model = nn.Module()
    model.owner = owner
    found = collect(model, CPU)
    (name,) = found.scalars
    found.set_scalars({name: 0.25})
    with pytest.raises(LayoutMismatch, match="cannot be set"):
        found.set_scalars({name: 0.5})


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0])
def test_equal_in_every_bit_is_equal(value: float) -> None:
    model = nn.Module()
    model.owner = (value,)
    found = collect(model, CPU)
    found.set_scalars(dict(found.scalars))
    with pytest.raises(LayoutMismatch):
        found.set_scalars({"owner[0]": 0.0})


def test_other_names_of_scalars_are_refused() -> None:
    model = nn.Module()
    model.one = 1.0
    with pytest.raises(LayoutMismatch, match=r"1 of the source's numbers are not in this model: \['two'\]"):
        collect(model, CPU).set_scalars({"two": 1.0})


def test_holding_what_was_found_holds_the_memory() -> None:
    model = nn.Linear(64, 64)
    found = collect(model, CPU)
    address = found.tensors[0].address
    expected = model.weight.detach().clone()
    model.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    assert found.kept["weight"].data_ptr() == address
    assert torch.equal(found.kept["weight"], expected)


def test_messages_are_bounded() -> None:
    text = shown({f"layer.{index}": "gone" for index in range(20)})
    assert text.endswith("and 12 more")
    assert text.count("(gone)") == 8
