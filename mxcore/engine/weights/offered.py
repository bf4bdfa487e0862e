"""The weights of one model on their way: filled from a peer or from storage, then offered.

*Raw* weights are what filling leaves, *processed* ones what processing leaves; the two kinds never meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import nn

from mxcore.engine.weights.collect import Collected
from mxcore.engine.weights.evidence import Built, bytes_by_name, packed_away, some
from mxcore.engine.weights.structure import (
    FLAG_PREFIX,
    flags_of,
    numbers_of,
    require_same_structure,
    set_flags,
    structure_of,
    structure_rows,
)
from mxcore.errors import LayoutMismatch, LayoutUnsupported
from mxcore.transfer.layout import ChunkDigests, Chunks, Layout, Manifest, Placement, Scalars, build_layout, chunk_set
from mxcore.transfer.receive import ReceiveReport
from mxcore.transfer.route import memory_digests

__all__ = ["Fit", "Kind", "Receive", "Weights", "synchronize"]

Kind: TypeAlias = Literal["processed", "raw"]
Fit: TypeAlias = Callable[[Manifest], Placement]
"""Where what a holder's manifest lists lies in this model; raises LayoutMismatch where it does not fit."""

Receive: TypeAlias = Callable[[Fit], ReceiveReport]
"""Asks holders for their manifest until one fits, and fills the memory, verified; raises otherwise."""


class Weights:
    """The weights of one model of one kind. Holding this holds their memory, whatever the engine drops.

    Call `loaded` after filling, `processed` after processing; then `layout`, `placement`, `scalars` and `found` are
    what can be offered, and `received` says what came from a peer. Both raise LayoutUnsupported with names when these
    weights cannot be moved. Not thread-safe.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.found = Collected()
        self.scalars: Scalars = {}  # what the manifest says beside tensors: numbers, and the structure
        self.layout: Layout | None = None
        self.placement: Placement | None = None
        self.received: ReceiveReport | None = None
        self._built: Built | None = None
        self._flags: dict[str, bool] = {}
        self._bytes_before: dict[str, int] = {}
        self.digests: ChunkDigests | None = None  # of raw weights; who serves processed ones makes them
        self._overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loaded(self, model: nn.Module, built: Built, receive: Receive | None = None) -> None:
        """After filling. Raw: these are the weights, taken from a peer if `receive` is given."""
        self._built = built
        found = built.look(model)
        self._flags = built.flags(found)
        if self.kind == "processed":  # names and sizes only: processing wants the memory back
            self._bytes_before = bytes_by_name(found)
            return
        self._take(model, found, built, receive)
        if self.received is not None:
            self.digests = self.received.digests
        elif self.layout is not None and self.placement is not None:
            self.digests = memory_digests(self.layout, self.placement)

    def runs(self, model: nn.Module, built: Built) -> None:
        """In place of `loaded`, for processed weights of a model that ran before: `built` is from when it was built."""
        self._built = built
        self._flags = built.flags(built.look(model))
        self._bytes_before = self._bytes_before or built.bytes_by_name()

    def processed(self, model: nn.Module, receive: Receive | None = None) -> None:
        """After processing. Processed: these are the weights. Raw: they must still be what they were."""
        built = self._built
        if built is None:
            raise LayoutUnsupported("the weights were not seen before processing: what it packed away is unknown")
        if self.kind == "processed":
            found = built.look(model)
            found.refused.update(packed_away(self._bytes_before, found))
            self._take(model, found, built, receive)
            return
        synchronize(self.device)
        if changed := self._changed():
            raise LayoutUnsupported(
                f"raw weights are not what was loaded, processing wrote over some of them: {some(changed)}"
            )

    def _changed(self) -> set[str]:
        """Raw tensors with bytes in chunks that are no more what was loaded."""
        layout, placement, before = self.layout, self.placement, self.digests
        if layout is None or placement is None or before is None:
            return set()
        now = memory_digests(layout, placement, kind=before.kind)
        if now == before:
            return set()
        chunks = Chunks(layout)
        wrong = chunk_set(chunk for chunk in range(len(chunks)) if now.of_chunk(chunk) != before.of_chunk(chunk))
        extents = chunks.extents_of(wrong)
        return {tensor.name for tensor in layout.tensors if tensor.extent in extents}

    def bytes_beside(self, model: nn.Module) -> int:
        """What holding these weights costs: bytes of storages that the finished `model` does not use itself."""
        if self._built is None:
            return 0
        used = {tensor.storage_address for tensor in self._built.look(model).tensors}
        held = {tensor.storage_address: tensor.storage_bytes for tensor in self.found.tensors}
        return sum(size for address, size in held.items() if address not in used)

    def undo(self) -> None:
        """After a receive that failed: tensors that the constructor had valued have those values again.

        Engines keep modules such as rotary embeddings for the next model of the process, which must not find half of a
        transfer in them.
        """
        with torch.no_grad():
            for tensor, before in self._overwritten:
                tensor.copy_(before)
        self._overwritten = []
        synchronize(self.device)

    def _take(self, model: nn.Module, found: Collected, built: Built, receive: Receive | None) -> None:
        if receive is not None:
            self._receive(model, found, built, receive)
            return
        weights = built.weights(found)
        weights.require_movable()
        if not any(bytes_by_name(weights).values()):
            raise LayoutUnsupported("loading wrote no weight: there is nothing to offer")
        structure = structure_rows(weights, self._flags) if self.kind == "processed" else set()
        self.layout, self.placement = build_layout(self.kind, weights.tensors)
        synchronize(self.device)
        self.found = weights
        flags = {FLAG_PREFIX + name: float(value) for name, value in self._flags.items()}
        self.scalars = {**weights.scalars, **dict.fromkeys(structure), **flags}

    def _receive(self, model: nn.Module, found: Collected, built: Built, receive: Receive) -> None:
        ours = built.weights(found)
        ours.require_movable()
        structure = structure_rows(ours, self._flags) if self.kind == "processed" else set()
        flags: dict[str, bool] = {}

        def fit(manifest: Manifest) -> Placement:
            require_same_structure(structure_of(manifest.scalars), structure)
            flags.clear()
            flags.update(flags_of(manifest.scalars, model))
            if unknown := sorted(numbers_of(manifest.scalars).keys() - found.scalars.keys()):
                raise LayoutMismatch(f"{len(unknown)} of the holder's numbers are not in this model: {unknown[:5]}")
            chosen = built.chosen(found, manifest.layout)
            layout, placement = build_layout(self.kind, chosen.tensors)
            if layout.fingerprint != manifest.layout.fingerprint:
                differences = layout.differences(manifest.layout)
                raise LayoutMismatch(f"the holder has another layout: {'; '.join(differences[:5])}")
            synchronize(self.device)  # what still runs on the device must not write over what arrives
            self.found = chosen  # before anything is received: what is relayed meanwhile must stay
            self.layout, self.placement = manifest.layout, placement
            self.scalars = dict(manifest.scalars)  # who passes weights on says what it was told
            valued = (tensor for name, tensor in chosen.kept.items() if name not in found.parameters)
            self._overwritten = [(tensor, tensor.clone()) for tensor in valued] if self.kind == "raw" else []
            if built.written is not None:
                built.writing(chosen.kept.keys() | numbers_of(manifest.scalars).keys())
            return placement

        self.received = receive(fit)
        numbers = numbers_of(self.scalars)
        found.set_scalars(numbers)
        set_flags(flags, model)
        built.put_back(found, set(self.found.kept), numbers)
        self._overwritten = []


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
