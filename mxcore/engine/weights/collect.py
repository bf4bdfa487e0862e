"""A torch model → what is reachable by value from it: tensors, numbers, and the structure, all by name.

Weights hide: beside parameters and buffers there are tensors in plain attributes of modules, in helper objects that
are no modules (quantisation methods, attention implementations), in lists and dictionaries of those, on the parameters
themselves, and Python floats such as `_k_scale_float`. A copy that lacks one of them gives plausible, wrong text. So
everything reachable by value is walked. What of it is a weight, `evidence` says; what may be one and cannot be moved is
named in `refused`. Left out are bytes and sets, which hold handles and names, and integers of helper objects: budgets.

Nothing of torch is patched, and nothing is written until `Collected.set_scalars`.
"""

from __future__ import annotations

import enum
import functools
import operator
import struct
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mxcore.digest import xxh3_64
from mxcore.errors import LayoutMismatch, LayoutUnsupported
from mxcore.transfer.layout import LocalTensor

# Kernels' locks and scratch memory. Processing makes them, as it makes weights, and each launch writes them, long after
# they were looked at: nothing but the name that all kernels give them tells the two apart.
SCRATCH = frozenset({"workspace", "_workspace", "workspace_buffer", "_workspace_buffer"})
# Objects of these libraries, modules and tensors aside, lead out of the model: to each logger of the process, or to
# compiled code, which names the model's weights once more. What of an engine's own is left out, it says by identity.
MACHINERY = ("torch", "transformers", "triton", "logging", "threading", "ctypes")
MAXIMUM_DEPTH = 16  # below a module; what lies deeper is refused
MAXIMUM_HOST_VALUES = 64  # elements of a host tensor beside an accelerator's weights that travel as scalars
MAXIMUM_NAMES_SHOWN = 8
MAXIMUM_NESTING = 4  # of containers in a module's attribute, for integers
MAXIMUM_TEXT = 200  # characters of what was decided that are kept as they are

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}
_Setter = Callable[[float], None]
_BYTES = (bytes, bytearray, memoryview, array)  # handles, and the ring that an engine's ranks share: each process' own
_BY_NAME = (type, types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)


@dataclass
class Collected:
    """What was found; single-threaded.

    `tensors` in a stable order (modules in their order, attributes sorted), `scalars` by name, `kept` the tensors
    themselves: who holds them holds the storages. `refused` says, by name, what cannot be moved and why.
    """

    tensors: list[LocalTensor] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    decided: dict[str, str] = field(
        default_factory=dict
    )  # bools, texts, enums, dtypes; integers of modules and tensors
    classes: dict[str, str] = field(default_factory=dict)  # of modules and helper objects
    functions: dict[str, str] = field(
        default_factory=dict
    )  # where they, and classes that are values, are defined; classes of what functions alone hold
    modules: set[str] = field(default_factory=set)  # of the model's tree; the model itself is ""
    parameters: set[str] = field(default_factory=set)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    beside: dict[str, torch.Tensor] = field(default_factory=dict)  # of `refused`: tensors that have values
    opaque: dict[str, int] = field(default_factory=dict)  # of `refused`: ids of objects that nobody can look into
    refused: dict[str, str] = field(default_factory=dict)
    _setters: dict[str, _Setter] = field(default_factory=dict)

    def require_movable(self) -> None:
        """Raises LayoutUnsupported with the names and reasons if anything was refused."""
        if self.refused:
            raise LayoutUnsupported(f"{len(self.refused)} values cannot be moved: {shown(self.refused)}")

    def set_scalars(self, values: Mapping[str, float]) -> None:
        """Puts these numbers where ours came from; others stay.

        Raises LayoutMismatch for a name that is not here, or if a number that cannot be replaced (in a tuple, in a
        frozen object) differs; then some may have been set already and the model must not be used.
        """
        extra = sorted(values.keys() - self.scalars.keys())
        if extra:
            raise LayoutMismatch(
                f"{len(extra)} of the source's numbers are not in this model: {extra[:MAXIMUM_NAMES_SHOWN]}"
            )
        for name, value in values.items():
            if not _same(value, self.scalars[name]):
                self._setters[name](value)
                self.scalars[name] = value


def shown(reasons: Mapping[str, str]) -> str:
    """`name (reason), name (reason), … and N more` for a message."""
    parts = [f"{name} ({reason})" for name, reason in list(reasons.items())[:MAXIMUM_NAMES_SHOWN]]
    more = len(reasons) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def collect(model: nn.Module, device: torch.device, configuration: Sequence[object] = ()) -> Collected:
    """All that `model` holds, whose place is `device`. Refusals are recorded, not raised: `require_movable`.

    What hangs on the objects of `configuration` is left out: it describes the run, or carries it out (groups of
    processes), and is another one at each worker.
    """
    return _Walk(model, device, _hanging_on(configuration)).run()


def _hanging_on(roots: Sequence[object]) -> set[int]:
    """Ids of objects, without models and their tensors: a configuration may list those."""
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module | torch.Tensor) or not _may_hold(value, ()) or id(value) in found:
            continue
        found.add(id(value))
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, Sequence | set | frozenset):
            waiting += value
        elif not isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            waiting += (part for _, part in _attributes(value))
    return found


def _same(one: float, other: float) -> bool:
    return struct.pack("<d", one) == struct.pack("<d", other)


class _Walk:
    def __init__(self, model: nn.Module, device: torch.device, seen: set[int]) -> None:
        self.found = Collected()
        self.model = model
        self.device = device
        self.seen = seen
        self.alive: list[Any] = []  # temporaries must outlive the walk: their ids are in `seen`
        self.captured: list[tuple[str, str, int]] = []  # function, what it closes over, address of its storage
        self.functions: deque[tuple[Any, str, int]] = deque()  # last: what has a name of its own goes by that

    def run(self) -> Collected:
        modules = list(self.model.named_modules())
        self.seen.update(id(module) for _, module in modules)
        self.found.modules.update(name for name, _ in modules)
        for name, module in modules:
            self.module(module, f"{name}." if name else "")
        self.run_functions()
        storages = {tensor.storage_address for tensor in self.found.tensors}
        for name, part, address in self.captured:
            if address not in storages:
                self.found.refused[name] = f"a function that closes over {part}, which nothing else names"
        return self.found

    def run_functions(self) -> None:
        while self.functions:
            self.function(*self.functions.popleft())

    def module(self, module: nn.Module, prefix: str, depth: int = 0) -> None:
        self.found.classes[prefix.rstrip(".")] = _class_of(module)
        self.found.parameters.update(prefix + name for name in module._parameters)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in SCRATCH:
                self.value(tensor, prefix + name, _fixed(prefix + name), depth)
        self.attributes(module, prefix, depth)

    def attributes(self, owner: Any, prefix: str, depth: int) -> None:
        for name, value in _attributes(owner):
            if name in SCRATCH:
                continue
            if isinstance(owner, nn.Module | torch.Tensor):
                if isinstance(value, int):
                    self.found.decided[prefix + name] = repr(value)
                    continue
                if id(value) not in self.seen and (integers := ", ".join(_integers(value))):
                    self.found.decided[f"{prefix}{name}, integers"] = _short(integers)
            self.value(value, prefix + name, _setter(functools.partial(setattr, owner, name), prefix + name), depth)

    def value(self, value: Any, name: str, setter: _Setter, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            return self.tensor(value, name, depth)
        if isinstance(value, float):  # bool is no float
            return self.scalar(name, value, setter)
        if isinstance(value, np.floating):
            kind: Any = type(value)
            return self.scalar(name, float(value), lambda number: setter(kind(number)))
        if isinstance(value, bool | str | complex | enum.Enum | torch.dtype | np.generic):
            self.found.decided[name] = _short(repr(value))
            return None
        if isinstance(value, _BY_NAME):
            self.found.functions[name] = _place(value)
            return None
        if not _may_hold(value) or id(value) in self.seen:
            return None
        self.seen.add(id(value))
        self.alive.append(value)
        if depth >= MAXIMUM_DEPTH:
            self.found.refused[name] = f"nested deeper than {MAXIMUM_DEPTH} levels: cannot be examined"
            return None
        return self.holder(value, name, depth + 1)

    def holder(self, value: Any, name: str, depth: int) -> None:
        if type(value).__name__ == "PyCapsule" or isinstance(value, torch.ScriptObject):
            self.found.refused[name] = f"an opaque {type(value).__name__}"
            self.found.opaque[name] = id(value)
        elif isinstance(value, np.ndarray):
            self.array(value, name, depth)
        elif isinstance(value, nn.Module):
            for path, module in value.named_modules():
                self.seen.add(id(module))
                self.module(module, f"{name}.{path}." if path else f"{name}.", depth)
        elif isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                self.item(value, key, name, depth)
        elif isinstance(value, Sequence):
            for index in range(len(value)):
                self.item(value, index, name, depth)
        elif isinstance(value, types.MethodType | functools.partial | types.FunctionType):
            self.functions.append((value, name, depth))
        elif hasattr(type(value), "__del__"):
            self.found.refused[name] = f"a {type(value).__name__}, which owns memory that cannot be seen"
            self.found.opaque[name] = id(value)
        else:
            self.found.classes[name] = _class_of(value)
            self.attributes(value, f"{name}.", depth)

    def item(self, owner: Any, key: Any, name: str, depth: int) -> None:
        place = f"{name}[{key!r}]"
        self.value(owner[key], place, _setter(functools.partial(operator.setitem, owner, key), place), depth)

    def function(self, value: Any, name: str, depth: int) -> None:
        """What a function closes over may be weights in a form of its own: tensors are fine only where a name moves
        them too, and numbers only where they are equal.
        """
        if not isinstance(value, functools.partial):
            self.found.functions[name] = _place(value)
        if isinstance(value, types.MethodType):
            self.value(value.__self__, f"{name}.__self__", _fixed(name), depth)
            return
        inner = _Walk(self.model, self.device, self.seen)
        inner.alive, inner.captured = self.alive, self.captured
        for part, captured in _captured(value):
            inner.value(captured, f"{name}.{part}", _fixed(f"{name}.{part}"), depth)
        inner.run_functions()
        self.found.functions |= inner.found.functions | inner.found.classes
        self.found.decided |= inner.found.decided
        self.found.scalars |= inner.found.scalars
        self.found._setters |= inner.found._setters
        self.captured += [(name, tensor.name, tensor.storage_address) for tensor in inner.found.tensors]
        if inner.found.refused:
            self.found.refused[name] = f"a function that closes over {shown(inner.found.refused)}"
            self.found.opaque[name] = id(value)

    def array(self, value: np.ndarray[Any, Any], name: str, depth: int) -> None:
        """As the tensor that shares its memory; what torch cannot share is looked at, and moved by nobody."""
        try:
            tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
        except (TypeError, ValueError):  # texts, records, objects; steps backwards
            self.found.refused[name] = f"an array of {value.dtype} that cannot be moved"
            self.found.opaque[name] = id(value)
            return
        if value.flags.writeable:
            self.alive.append(tensor)
            self.tensor(tensor, name, depth)
        else:
            self.found.refused[name] = "an array that cannot be written"
            self.found.beside[name] = tensor

    def scalar(self, name: str, value: float, setter: _Setter) -> None:
        self.found.scalars[name] = value
        self.found._setters[name] = setter

    def tensor(self, tensor: torch.Tensor, name: str, depth: int) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            inner, _context = tensor.__tensor_flatten__()
            for part in inner:
                if name in self.found.parameters:
                    self.found.parameters.add(f"{name}.{part}")
                self.value(getattr(tensor, part), f"{name}.{part}", _fixed(f"{name}.{part}"), depth + 1)
            return
        if vars(tensor) and id(tensor) not in self.seen:
            self.seen.add(id(tensor))
            self.attributes(tensor, f"{name}.", depth + 1)
        reason = _unmovable(tensor, self.device)
        if reason is None:
            self.found.kept[name] = tensor.detach()
            self.found.tensors.append(_local(name, tensor))
        elif tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel() <= MAXIMUM_HOST_VALUES:
            for index, number in enumerate(tensor.detach().reshape(-1).tolist()):
                self.scalar(f"{name}[{index}]", float(number), _element_setter(tensor, index))
        else:
            self.found.refused[name] = reason
            if not tensor.is_meta:
                self.found.beside[name] = tensor.detach()


def _class_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _place(value: Any) -> str:
    """Where a function, a method or a class is defined."""
    code = getattr(value, "__code__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{getattr(value, '__module__', '')}.{name}" + (f":{code.co_firstlineno}" if code is not None else "")


def _short(text: str) -> str:
    return text if len(text) <= MAXIMUM_TEXT else f"{text[:MAXIMUM_TEXT]}… ({xxh3_64(text.encode()):x})"


def _integers(value: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """The integers in a list, a tuple or a dictionary, each with its place."""
    if isinstance(value, int) and not isinstance(value, bool) and depth:
        yield f"{place}: {value}"
    elif isinstance(value, list | tuple) and depth < MAXIMUM_NESTING:
        for index, one in enumerate(value):
            yield from _integers(one, f"{place}[{index}]", depth + 1)
    elif isinstance(value, dict) and depth < MAXIMUM_NESTING:
        for key, one in value.items():
            if isinstance(key, str | int):
                yield from _integers(one, f"{place}[{key!r}]", depth + 1)


def _unmovable(tensor: torch.Tensor, device: torch.device) -> str | None:
    if tensor.is_meta:
        return "on the meta device: it has no values yet"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"layout {tensor.layout}: its memory is opaque"
    if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index):
        return f"on {tensor.device}, the weights are on {device}"
    return None


def _local(name: str, tensor: torch.Tensor) -> LocalTensor:
    storage = tensor.untyped_storage()
    return LocalTensor(
        name=name,
        dtype=str(tensor.dtype),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        address=storage.data_ptr() + tensor.storage_offset() * tensor.element_size(),
        itemsize_bytes=tensor.element_size(),
        storage_address=storage.data_ptr(),
        storage_bytes=storage.nbytes(),
        device_type=tensor.device.type,
        device_index=tensor.device.index or 0,
    )


def _may_hold(value: Any, left_out: Sequence[str] = MACHINERY) -> bool:
    if value is None or isinstance(value, int | str | complex | enum.Enum | type | torch.dtype | torch.device):
        return False
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | range | set | frozenset):
        return False
    if isinstance(value, _BYTES):
        return False
    if isinstance(value, nn.Module | torch.ScriptObject | types.FunctionType | types.MethodType | functools.partial):
        return True
    home = type(value).__module__
    return not any(home == module or home.startswith(f"{module}.") for module in left_out)


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    values = dict(getattr(owner, "__dict__", {}))
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(owner, name):
                values[name] = getattr(owner, name)
    skipped = _MODULE_INTERNALS if isinstance(owner, nn.Module) else ()
    return iter(sorted((name, value) for name, value in values.items() if name not in skipped))


def _captured(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield "func", function.func
        yield "args", function.args
        yield "keywords", function.keywords
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
    yield "defaults", (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def _setter(replace: _Setter, name: str) -> _Setter:
    """Around what puts a number in its place: what cannot be replaced is refused by name."""

    def put(value: float) -> None:
        try:
            replace(value)
        except (AttributeError, TypeError) as error:
            raise LayoutMismatch(f"{name} differs from the source's ({value}) and cannot be set: {error}") from error

    return put


def _element_setter(tensor: torch.Tensor, index: int) -> _Setter:
    def put(value: float) -> None:
        with torch.no_grad():
            tensor.detach().view(-1)[index] = value

    return put


def _fixed(name: str) -> _Setter:
    def put(value: float) -> None:
        raise LayoutMismatch(f"{name} differs from the source's ({value}) and cannot be set")

    return put
