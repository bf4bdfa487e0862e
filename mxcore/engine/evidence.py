"""What of a model is a weight: by what its constructor made, and what loading and processing did to that.

A weight is a parameter or a buffer that a checkpoint can have, and each tensor that loading or processing made, or made
anew in another form. All other tensors (rotary caches, activation buffers, tables of addresses) are *local*: each
worker's constructor makes its own, they are neither moved nor overwritten. A worker whose loading or processing wrote
into a local tensor all the same offers nothing: its manifest would lack a weight. So the set follows from the model's
code, at both ends, and never from a checkpoint's values.

Numbers are weights where they are new or changed. Classes, and what processing decided (bools, texts, enums, dtypes),
are structure: compared, never copied.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from mxcore.digest import xxh3_64
from mxcore.engine.collect import Collected, collect
from mxcore.transfer.layout import STRUCTURE_PREFIX, LocalTensor

__all__ = ["Built", "bytes_by_name", "digest", "packed_away", "structure_rows"]

LEAST_SHARE = 16  # of the bytes that a module loaded, the part that it must still have (four bits of float32: an 8th)

_Form: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]
_WRITTEN = "was made by the constructor, is in no checkpoint, and was written to by loading or processing"


@dataclass(frozen=True)
class _Local:
    """What the constructor gave a tensor that is no parameter; `value` only where it may have to be put back."""

    digest: int
    value: torch.Tensor | None


class Built:
    """A model as its constructor left it, by name. Holds no tensor of the model; with `copies`, small ones of its own.

    `copies` is for a model that is processed before its weights arrive: what processing writes into local tensors then
    comes from a placeholder, and `put_back` undoes it.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, copies: bool = False) -> None:
        found = collect(model, device)
        self._forms = {tensor.name: _form(tensor) for tensor in found.tensors}
        self._numbers = dict(found.scalars)
        self._decided = dict(found.decided)
        self._refused = set(found.refused)
        self._locals = {
            name: _Local(digest(found.kept[name]), found.kept[name].clone() if copies else None)
            for name in self._local_names(found)
        }

    def weights(self, found: Collected) -> Collected:
        """What of `found`, the same model later, is a weight; the rest is refused or left out."""
        local = self._local_names(found)
        tensors = [tensor for tensor in found.tensors if tensor.name not in local]
        names = {tensor.name for tensor in tensors}
        refused = {name: reason for name, reason in found.refused.items() if name not in self._refused}
        return Collected(
            tensors=tensors,
            scalars=self._changed(found.scalars),
            decided={name: text for name, text in found.decided.items() if self._decided.get(name) != text},
            classes=found.classes,
            kept={name: tensor for name, tensor in found.kept.items() if name in names},
            refused=refused,
        )

    def written(self, found: Collected) -> dict[str, str]:
        """Local tensors that are not as built, and why that matters."""
        return dict.fromkeys(self._touched(found), _WRITTEN)

    def put_back(self, found: Collected, received: Mapping[str, float]) -> None:
        """Local tensors as built (needs `copies`), and numbers that the source did not send."""
        with torch.no_grad():
            for name in self._touched(found):
                if (value := self._locals[name].value) is not None:
                    found.kept[name].copy_(value)
        changed = self._changed(found.scalars).keys() & self._numbers.keys()
        found.set_scalars({name: self._numbers[name] for name in changed - received.keys()})

    def _local_names(self, found: Collected) -> set[str]:
        """As built by their form, and no view of a weight."""
        as_built = {
            tensor.name
            for tensor in found.tensors
            if tensor.name not in found.stored and self._forms.get(tensor.name) == _form(tensor)
        }
        moved = {tensor.storage_address for tensor in found.tensors if tensor.name not in as_built}
        return {
            tensor.name for tensor in found.tensors if tensor.name in as_built and tensor.storage_address not in moved
        }

    def _touched(self, found: Collected) -> list[str]:
        local = self._local_names(found)
        return [
            name for name in self._locals if name in local and digest(found.kept[name]) != self._locals[name].digest
        ]

    def _changed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in numbers.items() if repr(self._numbers.get(name)) != repr(value)}


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


def structure_rows(weights: Collected) -> dict[str, float]:
    """The structure as names without a number: what differs can be told, layers alike are one row, a digest has all."""
    rows = [f"{path} is a {kind}" for path, kind in weights.classes.items()]
    rows += [f"{path} = {text}" for path, text in weights.decided.items()]
    whole = hashlib.sha256("\0".join(sorted(rows)).encode()).hexdigest()
    short = {re.sub(r"\b\d+\b", "*", row) for row in rows}
    return {STRUCTURE_PREFIX + row: 0.0 for row in (*sorted(short), f"sha256 {whole}")}


def digest(tensor: torch.Tensor) -> int:
    """XXH3 of a tensor's values in the order of its shape."""
    if not tensor.numel():
        return 0
    return xxh3_64(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _form(tensor: LocalTensor) -> _Form:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride)
