"""Values of weights that a function, an array or a container alone has: they come along, or are refused.

And what processing decided, where no flag says so: a method, a default of a function, a class, an order of integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

from mxcore.engine.weights import Built, MarkUninitialised, Weights  # noqa: E402
from mxcore.engine.weights.collect import collect  # noqa: E402
from mxcore.engine.weights.structure import structure_rows  # noqa: E402
from mxcore.errors import LayoutMismatch  # noqa: E402
from tests.engine.in_memory import received_from  # noqa: E402

CPU = torch.device("cpu")


class Kernel:
    """Two ways to do one thing, and a number."""

    gain: float = 0.0

    def one(self, x: float) -> float:
        return x

    def other(self, x: float) -> float:
        return -x


class Layer(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.shape = [4, 4]


def scaled(x: float, gain: float) -> float:
    return x * gain


def turned(x: float, gain: float) -> float:
    return -x * gain


def largest(layer: Any) -> float:
    return float(layer.weight.max())


def closure(layer: Any) -> None:
    gain = largest(layer)
    layer.call = lambda x: x * gain


def default(layer: Any) -> None:
    gain = largest(layer)
    layer.call = lambda x, _gain=gain: x * _gain


def partly(layer: Any) -> None:
    layer.call = functools.partial(scaled, gain=largest(layer))


def order(layer: Any) -> None:
    layer.order = {"rows": layer.weight.argmax(0).tolist()}


def complex_number(layer: Any) -> None:
    layer.turn = complex(largest(layer), 1)


def fixed_array(layer: Any) -> None:
    layer.table = layer.weight.numpy().copy()
    layer.table.flags.writeable = False


def texts(layer: Any) -> None:
    layer.table = np.array([str(largest(layer))])


def loaded(seed: int) -> tuple[Layer, Built]:
    with MarkUninitialised():
        layer = Layer()
    built = Built(layer, CPU, copies=True)
    layer.weight.data.copy_(torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)))
    return layer, built


def exchange(process: Callable[[Any], None]) -> tuple[Layer, Layer]:
    """Processed weights from a layer to another, which processed a placeholder."""
    (source, built), offered = loaded(1), Weights("processed", CPU)
    offered.loaded(source, built)
    process(source)
    offered.processed(source)
    (target, built), taken = loaded(2), Weights("processed", CPU)
    taken.loaded(target, built)
    process(target)
    taken.processed(target, received_from(offered))
    return source, target


@pytest.mark.parametrize("process", [closure, default, order, complex_number])
def test_values_that_nobody_can_replace_are_refused_where_they_differ(process: Callable[[Any], None]) -> None:
    with pytest.raises(LayoutMismatch):
        exchange(process)


@pytest.mark.parametrize("process", [fixed_array, texts])
def test_arrays_that_nobody_can_fill_are_not_offered(process: Callable[[Any], None]) -> None:
    layer, built = loaded(1)
    process(layer)
    assert built.weights(built.look(layer)).refused.keys() == {"table"}
    again = Built(layer, CPU)
    assert again.weights(again.look(layer)).refused == {}  # the constructor's own are local


def test_arrays_come_along_as_tensors_do() -> None:
    def process(layer: Any) -> None:
        layer.table = layer.weight.numpy().copy()
        layer.largest = layer.weight.numpy().max()  # a float32 of numpy's, which is no float

    source, target = exchange(process)
    assert np.array_equal(target.table, source.table)
    assert target.largest == source.largest
    assert type(target.largest) is np.float32


def test_a_number_that_a_partial_function_is_called_with_comes_along() -> None:
    source, target = exchange(partly)
    assert target.call(1.0) == source.call(1.0) != 0


def test_what_has_a_name_goes_by_it_though_a_function_before_it_closes_over_it() -> None:
    """Functions come last: what only they hold has no other name."""

    def process(layer: Any) -> None:
        kernel = Kernel()
        kernel.gain = largest(layer)
        kernel.table = layer.weight.t().contiguous()
        layer.call = lambda x: x * kernel.gain
        layer.kernel = kernel

    source, target = exchange(process)
    assert target.kernel.gain == source.kernel.gain
    assert torch.equal(target.kernel.table, source.kernel.table)
    assert target.call(1.0) == source.call(1.0)


def flagged(flag: bool) -> Callable[[Any], None]:
    def process(layer: Any) -> None:
        layer.call = lambda x, _prepacked=flag: x if _prepacked else -x

    return process


def assigned(value: Any) -> Callable[[Any], None]:
    def process(layer: Any) -> None:
        layer.call = value

    return process


def holding(of: Any) -> Callable[[Any], None]:
    return assigned(lambda x: (x, of))


KERNEL = Kernel()
DECISIONS: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "default": (flagged(flag=True), flagged(flag=False)),
    "method": (assigned(KERNEL.one), assigned(KERNEL.other)),
    "partial": (assigned(functools.partial(scaled, gain=1.0)), assigned(functools.partial(turned, gain=1.0))),
    "operation": (assigned(torch.ops.aten.add), assigned(torch.ops.aten.sub)),
    "overload": (assigned(torch.ops.aten.add.Tensor), assigned(torch.ops.aten.sub.Tensor)),
    "built in": (assigned(max), assigned(min)),
    "class": (assigned(Kernel), assigned(Layer)),
    "behind a function": (holding(KERNEL), holding(Layer)),
    "integers": (assigned([3, {"a": (1, True)}]), assigned([3, {"a": (2, True)}])),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_what_processing_decided_without_a_flag_is_structure(name: str) -> None:
    def rows(process: Callable[[Any], None]) -> set[str]:
        layer, built = loaded(1)
        process(layer)
        return structure_rows(built.weights(built.look(layer)))

    one, other = DECISIONS[name]
    assert rows(one) == rows(one) != rows(other)


def test_what_a_constructor_made_of_functions_is_each_workers_own() -> None:
    """Eager and compiled engines have other ones."""

    def rows(wrap: Callable[[Any], Any]) -> set[str]:
        with MarkUninitialised():
            layer = Layer()
        layer.forward_method = wrap(layer.forward)
        built = Built(layer, CPU)
        layer.weight.data.fill_(1)
        return structure_rows(built.weights(built.look(layer)))

    helper = Kernel()
    assert rows(lambda forward: forward) == rows(lambda forward: lambda x: (helper, forward(x)))


def test_bytes_are_each_workers_own() -> None:
    """Handles of memory and of groups come as bytes; they are not looked into."""

    def rows(data: bytes) -> set[str]:
        layer, built = loaded(1)
        layer.handles = [data, bytearray(data), memoryview(data)]
        return structure_rows(built.weights(built.look(layer)))

    assert rows(b"here") == rows(b"there")


def test_functions_that_hold_each_other_end() -> None:
    def one() -> Any:
        return other

    def other() -> Any:
        return one

    layer = Layer()
    layer.call, layer.method = one, layer.forward
    assert {name for name in collect(layer, CPU).functions if name.startswith("call")} == {"call", "call.other"}
