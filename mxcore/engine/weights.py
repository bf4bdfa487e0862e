"""The weights of one model on their way: filled from a peer or from storage, then offered.

*Raw* weights are what filling leaves, *processed* ones what processing leaves; the two kinds never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import nn

from mxcore.digest import xxh3_64
from mxcore.engine.collect import Collected, collect, emptied, shown
from mxcore.errors import LayoutUnsupported
from mxcore.transfer.layout import Layout, Placement, build_layout
from mxcore.transfer.receive import ReceiveReport

__all__ = ["Kind", "Receive", "Weights", "remember_computed", "synchronize"]

Kind: TypeAlias = Literal["processed", "raw"]
Receive: TypeAlias = Callable[[Layout, Placement, Mapping[str, float]], ReceiveReport]
"""Fills the memory of a placement from a peer, verified; raises otherwise. The numbers are this worker's scalars."""


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
        self.layout: Layout | None = None
        self.placement: Placement | None = None
        self.received: ReceiveReport | None = None
        self._before: Collected | None = None
        self._digests: dict[str, int] = {}

    def loaded(self, model: nn.Module, receive: Receive | None = None) -> None:
        """After filling. Raw: these are the weights, taken from a peer if `receive` is given."""
        found = collect(model, self.device)
        if self.kind == "processed":
            # names and shapes only: tensors, and what sets numbers on them, would hold the raw weights
            self._before = Collected(tensors=found.tensors)
            return
        self._take(found, receive)
        self._digests = _digests(found.kept)

    def processed(self, model: nn.Module, receive: Receive | None = None) -> None:
        """After processing. Processed: these are the weights. Raw: they must still be what they were."""
        if self.kind == "processed":
            if self._before is None:
                raise LayoutUnsupported("the weights were not seen before processing: what it packed away is unknown")
            found = collect(model, self.device)
            found.refused.update(emptied(self._before, found))
            self._take(found, receive)
            return
        synchronize(self.device)
        now = _digests(self.found.kept)
        reason = "changed in place by processing"
        changed = {name: reason for name, digest in self._digests.items() if now[name] != digest}
        if changed:
            raise LayoutUnsupported(f"{len(changed)} raw tensors are not what was loaded: {shown(changed)}")

    def bytes_beside(self, model: nn.Module) -> int:
        """What holding these weights costs: bytes of storages that the finished `model` does not use itself."""
        used = {tensor.storage_address for tensor in collect(model, self.device).tensors}
        held = {tensor.storage_address: tensor.storage_bytes for tensor in self.found.tensors}
        return sum(size for address, size in held.items() if address not in used)

    def _take(self, found: Collected, receive: Receive | None) -> None:
        found.require_movable()
        self.layout, self.placement = build_layout(self.kind, found.tensors)
        synchronize(self.device)  # what still runs on the device must not write over what arrives
        self.found = found  # before anything is received: what is relayed meanwhile must stay
        if receive is not None:
            self.received = receive(self.layout, self.placement, found.scalars)
            found.set_scalars(self.received.scalars)


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


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {
        name: xxh3_64(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
        if tensor.numel()
    }
