"""What of a model is a weight: by what its constructor made, and what loading and processing did to that.

A weight is a parameter, whatever its bytes, unless it was uninitialised and nothing wrote it; and each other tensor
that loading or processing made, made anew in another form, or changed. All else (rotary caches, activation buffers,
tables of addresses) is *local*: each worker's constructor makes its own. Numbers are weights where they are new or
changed. Classes, and what processing decided, are structure (`structure`): compared, never copied.

Who receives does not decide this: the holder's manifest says what the weights are. What the receiver's own processing
of placeholders wrote, and the manifest lacks, is put back to what the constructor made.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from mxcore.digest import xxh3_64
from mxcore.engine.weights.collect import Collected, collect
from mxcore.engine.weights.engines_own import EnginesOwn, Form, form_of
from mxcore.engine.weights.uninitialised import still_marked
from mxcore.errors import LayoutMismatch
from mxcore.transfer.layout import Layout, LocalTensor

__all__ = ["Built", "bytes_by_name", "digest", "packed_away", "some"]

LEAST_SHARE = 16  # of the bytes that a module loaded, the part that it must still have (four bits of float32: an 8th)
MOST_ADDRESSES = 65536  # elements of a tensor that may be a table of addresses
_NAMED = 5

_WORDS = (torch.int64, torch.uint64)


class Built:
    """A model as its constructor left it, by name. Holds no tensor of the model; with `copies`, copies of some.

    `copies` is for a model whose weights arrive from elsewhere: `put_back` undoes what was made of placeholders. With
    `keeps_copies` it can do so again and again: the copies are in host memory then, and those that `copied` knows are
    not made a second time. `configuration` is what `collect` leaves out.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        configuration: Sequence[object] = (),
        *,
        copies: bool = False,
        keeps_copies: bool = False,
        copied: Callable[[torch.Tensor], torch.Tensor | None] = lambda tensor: None,
    ) -> None:
        self._device = device
        self._keeps_copies = keeps_copies
        self._configuration = configuration
        self._own = EnginesOwn()
        self.written: set[str] | None = None
        """Of a model that runs: names of the tensors and numbers that loading wrote, with this version or before."""
        found = self.look(model)
        self._forms: dict[str, Form] = {tensor.name: form_of(tensor) for tensor in found.tensors}
        self._unwritten = still_marked(found.kept)
        self._numbers = dict(found.scalars)
        self._decided = dict(found.decided)
        self._functions = dict(found.functions)
        self._refused = dict(found.refused)
        self._opaque = dict(found.opaque)
        self._beside = {name: digest(tensor) for name, tensor in found.beside.items() if _has_bytes(tensor)}
        valued = self._valued(found)
        self._digests = {name: digest(found.kept[name]) for name in valued}
        place = torch.device("cpu") if keeps_copies else None  # for as long as the model runs: not on its device
        self._copies: dict[str, torch.Tensor] = {}
        for name in valued if copies else ():
            known = copied(found.kept[name])
            self._copies[name] = found.kept[name].to(place, copy=True) if known is None else known

    def look(self, model: nn.Module) -> Collected:
        """All that the model holds now; of one that runs, without what is the engine's own."""
        return self._own.taken_from(collect(model, self._device, self._configuration))

    def settle(self, model: nn.Module) -> None:
        """When a model that will run, or runs, was loaded: what it holds now is what loading and processing left."""
        found = self.look(model)
        self._own.settle(found)
        weights = self.weights(found)
        self.writing(weights.kept.keys() | weights.scalars.keys())

    def begin(self, model: nn.Module) -> None:
        """Before a model that was settled, and has run since, is given other weights."""
        found = collect(model, self._device, self._configuration)
        weights = self.weights(found)
        self._own.begin(found, (weights.kept.keys() | weights.scalars.keys()) - (self.written or set()))

    def writing(self, names: Collection[str]) -> None:
        """Before something else than the constructor gives these tensors and numbers a value."""
        self.written = {*(self.written or ()), *names}

    def bytes_by_name(self) -> dict[str, int]:
        """Of each tensor's elements, as the constructor made it."""
        return {
            name: getattr(torch, dtype.removeprefix("torch.")).itemsize * math.prod(shape)
            for name, (dtype, shape, _stride) in self._forms.items()
        }

    def weights(self, found: Collected) -> Collected:
        """What of `found`, the same model later, is a weight; `refused` has what should be and cannot be moved."""
        local = self._local(found)
        tensors = [tensor for tensor in found.tensors if tensor.name not in local]
        names = {tensor.name for tensor in tensors}
        return Collected(
            tensors=tensors,
            scalars=_changed(found.scalars, self._numbers),
            decided={name: text for name, text in found.decided.items() if self._decided.get(name) != text},
            classes=found.classes,
            functions={name: text for name, text in found.functions.items() if self._functions.get(name) != text},
            parameters=found.parameters & names,
            kept={name: tensor for name, tensor in found.kept.items() if name in names},
            refused=self._newly_refused(found) | self._addresses(found, tensors),
        )

    def chosen(self, found: Collected, theirs: Layout) -> Collected:
        """Those tensors of `found` that a holder's layout names.

        Raises LayoutMismatch: one is not here, or what is a weight here for certain is not there.
        """
        names = {tensor.name for tensor in theirs.tensors}
        missing = names - found.kept.keys()
        if missing:
            raise LayoutMismatch(f"this model has no {some(missing)}, which the holder's has; {_refusals(found)}")
        certain = {
            tensor.name
            for tensor in found.tensors
            if self._forms.get(tensor.name) != form_of(tensor)
            or (tensor.name in found.parameters and tensor.name not in self._unwritten)
        }
        extra = certain - names
        if extra:
            raise LayoutMismatch(f"the holder's model has no {some(extra)}, which this one has")
        return Collected(
            tensors=[tensor for tensor in found.tensors if tensor.name in names],
            parameters=found.parameters & names,
            kept={name: tensor for name, tensor in found.kept.items() if name in names},
        )

    def flags(self, found: Collected) -> dict[str, bool]:
        """Bools of the model and of modules in it that were made or changed since."""
        return {
            name: text == "True"
            for name, text in found.decided.items()
            if name.rpartition(".")[0] in found.modules
            and text in ("True", "False")
            and self._decided.get(name) != text
        }

    def put_back(self, found: Collected, tensors: set[str], numbers: Mapping[str, float]) -> None:
        """What was written here and nobody sent is as built again (tensors: needs `copies`); of a model that runs, what
        loading wrote, and not what the engine wrote."""
        written = self.written
        with torch.no_grad():
            for name, value in self._copies.items():
                tensor = found.kept.get(name)
                is_ours = name not in tensors and (written is None or name in written)
                if is_ours and tensor is not None and tensor.shape == value.shape:
                    tensor.copy_(value)
        changed = _changed(found.scalars, self._numbers).keys() & self._numbers.keys()
        changed = changed if written is None else changed & written
        found.set_scalars({name: self._numbers[name] for name in changed - numbers.keys()})
        if not self._keeps_copies:
            self._copies.clear()

    def _valued(self, found: Collected) -> list[str]:
        """Tensors that the constructor gave values, apart from parameters and what shares their memory."""
        stored = {tensor.storage_address for tensor in found.tensors if tensor.name in found.parameters}
        return [
            tensor.name
            for tensor in found.tensors
            if tensor.storage_address not in stored and tensor.name not in self._unwritten
        ]

    def _local(self, found: Collected) -> set[str]:
        """As built, or never written; and no view of a weight."""
        unwritten = still_marked({name: found.kept[name] for name in self._unwritten & found.kept.keys()})

        def is_local(tensor: LocalTensor) -> bool:
            name = tensor.name
            if self._forms.get(name) != form_of(tensor):
                return False
            if name in self._unwritten:
                return name in unwritten
            if name in found.parameters:
                return False
            return name not in self._digests or digest(found.kept[name]) == self._digests[name]

        local = {tensor.name for tensor in found.tensors if is_local(tensor)}
        moved = {tensor.storage_address for tensor in found.tensors if tensor.name not in local}
        return {tensor.name for tensor in found.tensors if tensor.name in local and tensor.storage_address not in moved}

    def _newly_refused(self, found: Collected) -> dict[str, str]:
        """Without what the constructor made and nothing changed."""
        refused = {}
        for name, reason in found.refused.items():
            as_built = self._refused.get(name) == reason and found.opaque.get(name) == self._opaque.get(name)
            if name in found.beside:
                tensor = found.beside[name]
                same = _has_bytes(tensor) and self._beside.get(name) == digest(tensor)
                as_built = as_built and same and name not in found.parameters
            if not as_built:
                refused[name] = reason
        return refused

    def _addresses(self, found: Collected, tensors: Sequence[LocalTensor]) -> dict[str, str]:
        """Words that loading or processing made and that point into this process: of no use elsewhere."""
        suspects = [
            tensor.name
            for tensor in tensors
            if tensor.dtype in map(str, _WORDS) and 0 < math.prod(tensor.shape) <= MOST_ADDRESSES
        ]
        if not suspects:
            return {}
        mapped = _Mapped(found.tensors)
        reason = "holds addresses of this process, which mean nothing in another one"
        return {
            name: reason
            for name in suspects
            if any(map(mapped.has, found.kept[name].reshape(-1).view(torch.int64).tolist()))
        }


class _Mapped:
    """This process' memory: what the kernel lists, and the model's own where a device has it."""

    def __init__(self, tensors: Sequence[LocalTensor]) -> None:
        ranges = {(tensor.storage_address, tensor.storage_address + tensor.storage_bytes) for tensor in tensors}
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, _, last = line.split(maxsplit=1)[0].partition("-")
            ranges.add((int(first, 16), int(last, 16)))
        self._ranges = sorted(ranges)
        self._begins = [begin for begin, _ in self._ranges]

    def has(self, address: int) -> bool:
        place = bisect_right(self._begins, address) - 1
        return any(begin <= address < end for begin, end in self._ranges[max(0, place - 1) : place + 1])


def packed_away(before: Mapping[str, int], after: Collected) -> dict[str, str]:
    """Weights that are empty now, of modules that have almost nothing left of what they had; `before`: bytes by name.

    An unused tensor that a kernel empties is no reason: its module still has its weights.
    """
    now = bytes_by_name(after)
    lost: dict[str, str] = {}
    for name, size in before.items():
        owner = name.rpartition(".")[0] + "."
        if not size or now.get(name) != 0:
            continue
        had = sum(bytes_ for other, bytes_ in before.items() if other.startswith(owner))
        has = sum(bytes_ for other, bytes_ in now.items() if other.startswith(owner))
        if has * LEAST_SHARE < had:
            lost[name] = f"emptied by processing: of {had} bytes {has} are left, the rest is where nobody can read it"
    return lost


def bytes_by_name(found: Collected) -> dict[str, int]:
    """Of each tensor's elements."""
    return {tensor.name: tensor.itemsize_bytes * math.prod(tensor.shape) for tensor in found.tensors}


def digest(tensor: torch.Tensor) -> int:
    """XXH3 of a tensor's values in the order of its shape."""
    if not tensor.numel():
        return 0
    return xxh3_64(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _changed(numbers: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if repr(before.get(name)) != repr(value)}


def some(names: set[str]) -> str:
    """The first of them, for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more


def _refusals(found: Collected) -> str:
    return f"{len(found.refused)} values here cannot be moved" if found.refused else "it is made otherwise"
