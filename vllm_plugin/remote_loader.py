"""vLLM's default loader over tensors that come from elsewhere: an object store, or the server's model cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig

from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint.checkpoint import Checkpoint
from mxcore.storage.plan.progress import Progress, ProgressDisplay
from vllm_plugin import compat
from vllm_plugin.storage_loader import StorageLoader
from vllm_plugin.weights import FromStorage

__all__ = ["FolderLoader", "RemoteLoader"]

Tensors = Callable[[Collection[str] | None, Progress], Iterator[tuple[str, torch.Tensor]]]
"""Gives (name, tensor) of the names, or of all; each tensor is good until the next one but one is asked for."""


class FolderLoader(FromStorage):
    """The default loader, which finds `folder` instead of the model that it is asked for."""

    def __init__(
        self,
        load_config: LoadConfig,
        settings: WorkerSettings,
        loaded: Callable[[nn.Module], None],
        progress: Progress,
        model: str,
        folder: Path,
    ) -> None:
        super().__init__(load_config, settings, loaded, progress)
        self._model = model
        self._folder = folder

    def _prepare_weights(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        instead = str(self._folder) if model_name_or_path == self._model else model_name_or_path
        return super()._prepare_weights(instead, *args, **kwargs)


class RemoteLoader(StorageLoader):
    """The default loader, which takes a checkpoint's tensors from `tensors`; raises what that raises."""

    def __init__(
        self,
        load_config: LoadConfig,
        settings: WorkerSettings,
        loaded: Callable[[nn.Module], None],
        progress: Progress,
        model: str,
        checkpoint: Checkpoint,
        tensors: Tensors,
    ) -> None:
        super().__init__(load_config, settings, progress)
        self._loaded = loaded
        self._model = model
        self.checkpoint = checkpoint
        self._tensors = tensors
        self.seconds = 0.0  # of reading, without building and processing

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the weights come from elsewhere."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """As the default loader."""
        started = time.monotonic()
        super().load_weights(model, model_config)
        self.seconds = round(time.monotonic() - started, 6)
        self._loaded(model)

    def _get_weights_iterator(self, source: Any) -> Any:
        if source.model_or_path != self._model:
            return super()._get_weights_iterator(source)
        experts = {"local_expert_ids": getattr(self, "local_expert_ids", None)}
        names = compat.wanted_names(self.checkpoint, (), experts)
        return ((source.prefix + name, tensor) for name, tensor in self._shown(None if names is None else set(names)))

    def _shown(self, names: set[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
        with ProgressDisplay("Loading safetensors") as display:

            def tell(done_bytes: int, total_bytes: int) -> None:
                self._progress(done_bytes, total_bytes)
                if compat.is_first_rank():
                    display(done_bytes, total_bytes)

            yield from self._tensors(names, tell)
