"""A model's weights on their way through vLLM's own `load_model`: filled from a peer or from storage, then offered.

vLLM builds, fills, processes and finishes a model in `BaseModelLoader.load_model`. Nothing of that is repeated here:
the two loaders below only fill, and look at the model after filling and after processing. *Raw* weights are what
filling leaves, *processed* ones what processing leaves; the two kinds never meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from mxcore.digest.digest import xxh3_64
from mxcore.errors import LayoutUnsupported
from mxcore.settings import WorkerSettings
from mxcore.storage.plan.progress import Progress
from mxcore.transfer.layout.layout import Layout, Placement, build_layout
from vllm_plugin import compat
from vllm_plugin.collect import Collected, collect, emptied, shown
from vllm_plugin.storage_loader import StorageLoader

Kind = Literal["processed", "raw"]
_SMALL = 2.0**-6  # a value of every floating-point type but those of four bits, which torch cannot fill


class Receive(Protocol):
    """Fills the memory of a placement from a peer, verified, and returns the source's scalars; raises otherwise."""

    def __call__(self, layout: Layout, placement: Placement, scalars: Mapping[str, float]) -> Mapping[str, float]: ...


class Weights:
    """The weights of one model of one kind. Holding this holds their memory, whatever the engine drops.

    Call `loaded` after filling, `processed` after processing; then `layout`, `placement` and `found` are what can be
    offered. Both raise LayoutUnsupported with names when these weights cannot be moved.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.found = Collected()
        self.layout: Layout | None = None
        self.placement: Placement | None = None
        self._before: Collected | None = None
        self._digests: dict[str, int] = {}

    def loaded(self, model: nn.Module, receive: Receive | None = None) -> None:
        """After filling. Raw: these are the weights, taken from a peer if `receive` is given."""
        found = collect(model, self.device)
        if self.kind == "processed":
            found.kept.clear()  # only names and shapes are needed, and processing wants its memory back
            self._before = found
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
        compat.synchronize(self.device)
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
        compat.synchronize(self.device)  # what still runs on the device must not write over what arrives
        self.found = found  # before anything is received: what is relayed meanwhile must stay
        if receive is not None:
            found.set_scalars(receive(self.layout, self.placement, found.scalars))


class FromStorage(StorageLoader):
    """The loader from storage; `loaded` sees the model right after its weights were read."""

    def __init__(
        self,
        load_config: LoadConfig,
        settings: WorkerSettings,
        loaded: Callable[[nn.Module], None],
        progress: Progress = lambda done_bytes, total_bytes: None,
    ) -> None:
        super().__init__(load_config, settings, progress)
        self._loaded = loaded
        self.seconds = 0.0  # of reading, without building and processing

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """As the default loader."""
        started = time.monotonic()
        super().load_weights(model, model_config)
        self.seconds = round(time.monotonic() - started, 6)
        self._loaded(model)


class FromPeer(BaseModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """Fills a model from a peer: raw weights before processing; processed ones after it, over what it made of nothing.

    `filled` sees the model before it is processed. After a failure `undo` puts back what building had put there:
    modules such as rotary embeddings are kept by vLLM for the next model of the process, which must not find half of a
    transfer in them.
    """

    def __init__(
        self, load_config: LoadConfig, weights: Weights, receive: Receive, filled: Callable[[nn.Module], None]
    ) -> None:
        super().__init__(load_config)
        self._weights = weights
        self._receive = receive
        self._filled = filled
        self._built: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.model: nn.Module | None = None  # while raw weights are taken: what they are taken for

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the weights are with a peer."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills `model`; raises TransferError or what the transfer raises."""
        self._built = _derived(model, self._weights.device)
        if self._weights.kind == "raw":
            self.model = model
            try:
                self._weights.loaded(model, self._receive)
            finally:
                self.model = None
        else:
            if compat.quantised_while_loaded(model):
                DummyModelLoader(compat.plain_load_config(self.load_config, "dummy")).load_weights(model, model_config)
            elif compat.processing_reads_values(model_config):
                _fill(model)
            self._weights.loaded(model)
        self._filled(model)

    def finish(self, model: nn.Module) -> None:
        """After `load_model`: takes processed weights. Raises as `load_weights`."""
        if self._weights.kind == "processed":
            self._weights.processed(model, self._receive)

    def forget(self) -> None:
        """The model is right and stays: what `undo` would need is dropped."""
        self._built.clear()

    def undo(self) -> None:
        """Restores the tensors that building the model computed; call it when the model is given up."""
        with torch.no_grad():
            for tensor, before in self._built:
                tensor.copy_(before)
        compat.synchronize(self._weights.device)
        self._built.clear()


def _fill(model: nn.Module) -> None:
    """One small value everywhere: enough for quantisation to do its arithmetic with, as fast as memory is written."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and not str(tensor.dtype).startswith("torch.float4"):
                tensor.fill_(_SMALL)


def _derived(model: nn.Module, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every tensor of a fresh model that is no parameter, with a copy."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if not parameter.is_meta}
    kept = collect(model, device).kept.values()
    return [(tensor, tensor.clone()) for tensor in kept if tensor.untyped_storage().data_ptr() not in parameters]


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {
        name: xxh3_64(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
        if tensor.numel()
    }
