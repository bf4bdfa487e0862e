"""The weights of one model on their way: filled from a peer or from storage, then offered.

*Raw* weights are what filling leaves, *processed* ones what processing leaves; the two kinds never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import nn

from mxcore.engine.collect import Collected, collect, shown
from mxcore.engine.evidence import Built, bytes_by_name, digest, packed_away, structure_rows
from mxcore.errors import LayoutUnsupported
from mxcore.transfer.layout import Layout, Placement, build_layout
from mxcore.transfer.receive import ReceiveReport

__all__ = ["Kind", "Receive", "Weights", "remember_computed", "synchronize"]

Kind: TypeAlias = Literal["processed", "raw"]
Receive: TypeAlias = Callable[[Layout, Placement, Mapping[str, float]], ReceiveReport]
"""Fills the memory of a placement from a peer, verified; raises otherwise. The mapping has every number of this model
that the peer may send, and this model's structure."""


class Weights:
    """The weights of one model of one kind. Holding this holds their memory, whatever the engine drops.

    Call `loaded` after filling, `processed` after processing; then `layout`, `placement` and `found` are what can be
    offered, and `received` says what came from a peer. Both raise LayoutUnsupported with names when these weights
    cannot be moved.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.found = Collected()
        self.scalars: dict[str, float] = {}  # what the manifest says beside tensors: numbers, and the structure
        self.layout: Layout | None = None
        self.placement: Placement | None = None
        self.received: ReceiveReport | None = None
        self._built: Built | None = None
        self._bytes_before: dict[str, int] = {}
        self._digests: dict[str, int] = {}

    def loaded(self, model: nn.Module, built: Built, receive: Receive | None = None) -> None:
        """After filling. Raw: these are the weights, taken from a peer if `receive` is given."""
        found = collect(model, self.device)
        self._built = built
        if self.kind == "processed":  # names and sizes only: processing wants the memory back
            self._bytes_before = bytes_by_name(built.weights(found))
            return
        self._take(found, built, receive)
        self._digests = {name: digest(tensor) for name, tensor in self.found.kept.items()}

    def processed(self, model: nn.Module, receive: Receive | None = None) -> None:
        """After processing. Processed: these are the weights. Raw: they must still be what they were."""
        built, self._built = self._built, None
        if self.kind == "processed":
            if built is None:
                raise LayoutUnsupported("the weights were not seen before processing: what it packed away is unknown")
            found = collect(model, self.device)
            found.refused.update(packed_away(self._bytes_before, found))
            self._take(found, built, receive)
            return
        synchronize(self.device)
        reason = "changed in place by processing"
        changed = {name: reason for name, tensor in self.found.kept.items() if digest(tensor) != self._digests[name]}
        if changed:
            raise LayoutUnsupported(f"{len(changed)} raw tensors are not what was loaded: {shown(changed)}")

    def bytes_beside(self, model: nn.Module) -> int:
        """What holding these weights costs: bytes of storages that the finished `model` does not use itself."""
        used = {tensor.storage_address for tensor in collect(model, self.device).tensors}
        held = {tensor.storage_address: tensor.storage_bytes for tensor in self.found.tensors}
        return sum(size for address, size in held.items() if address not in used)

    def _take(self, found: Collected, built: Built, receive: Receive | None) -> None:
        weights = built.weights(found)
        if receive is None:
            weights.refused.update(built.written(found))
        weights.require_movable()
        structure = structure_rows(weights) if self.kind == "processed" else {}
        self.layout, self.placement = build_layout(self.kind, weights.tensors)
        synchronize(self.device)  # what still runs on the device must not write over what arrives
        self.found = weights  # before anything is received: what is relayed meanwhile must stay
        self.scalars = {**weights.scalars, **structure}
        if receive is not None:
            self.received = receive(self.layout, self.placement, {**found.scalars, **structure})
            numbers = {name: value for name, value in self.received.scalars.items() if name not in structure}
            found.set_scalars(numbers)
            built.put_back(found, numbers)
            self.scalars = dict(self.received.scalars)  # who passes weights on says what it was told


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def remember_computed(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Copies every tensor of a fresh model that is no parameter; the result puts the copies back."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if not parameter.is_meta}
    found = collect(model, device).kept.values()
    copies = [(tensor, tensor.clone()) for tensor in found if tensor.untyped_storage().data_ptr() not in parameters]

    def restore() -> None:
        with torch.no_grad():
            for tensor, before in copies:
                tensor.copy_(before)
        synchronize(device)

    return restore
