"""What a running model holds beside what its load left in it: KV caches, flags that requests set, tables of the run.

None of it is a weight, and an update leaves it alone. It is told apart by time: what was there when the load ended is
the model's, what came until an update begins is the engine's, and what the update makes is the model's again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mxcore.engine.weights.collect import Collected
from mxcore.transfer.layout import LocalTensor

__all__ = ["EnginesOwn", "Form", "form_of"]

Form: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor's type, shape and strides."""


def form_of(tensor: LocalTensor) -> Form:
    """What of a tensor is not its values."""
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride)


@dataclass
class EnginesOwn:
    """Call `settle` when a load or an update has ended, `begin` before the next update; `taken_from` in between."""

    _left: dict[str, Form] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _decided: dict[str, str] = field(default_factory=dict)
    _tensors: dict[str, Form] = field(default_factory=dict)
    _others: set[str] = field(default_factory=set)
    _turned: dict[str, str] = field(default_factory=dict)

    def settle(self, found: Collected) -> None:
        """`found` is what the model holds now, without what is the engine's: all of it is the model's."""
        self._left = {tensor.name: form_of(tensor) for tensor in found.tensors}
        self._names = self._left.keys() | _others(found)
        self._decided = dict(found.decided)

    def begin(self, found: Collected, written: Collection[str]) -> None:
        """`found` is all that the model holds, after it ran; `written` are tensors and numbers that only the run gave
        the values that they have.
        """
        forms = {tensor.name: form_of(tensor) for tensor in found.tensors}
        self._tensors = {name: form for name, form in forms.items() if self._left.get(name) != form or name in written}
        self._others = (_others(found) - self._names) | (found.scalars.keys() & set(written))
        self._turned = {
            name: text for name, text in found.decided.items() if self._decided.get(name, text) != text
        }  # while it ran

    def taken_from(self, found: Collected) -> Collected:
        """`found` without what is the engine's, changed in place."""
        own = {tensor.name for tensor in found.tensors if self._tensors.get(tensor.name) == form_of(tensor)}
        found.tensors = [tensor for tensor in found.tensors if tensor.name not in own]
        found.parameters -= own
        for name in own:
            del found.kept[name]
        for named in (found.scalars, found.decided, found.classes, found.functions, found.refused):
            _drop(named, self._others)
        _drop(found.beside, self._others)
        _drop(found.opaque, self._others)
        for name, text in self._turned.items():
            if found.decided.get(name) == text:
                found.decided[name] = self._decided[name]
        return found


def _others(found: Collected) -> set[str]:
    """Names of all that is no tensor which can be moved."""
    return {*found.scalars, *found.decided, *found.classes, *found.functions, *found.refused}


def _drop(named: dict[str, Any], names: set[str]) -> None:
    for name in names & named.keys():
        del named[name]
