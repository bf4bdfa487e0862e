"""vLLM's default loader, with the bytes of safetensors files read by mxcore.storage.

Which files, which names and what becomes of the tensors stay vLLM's; MX_STORAGE_READER=engine leaves the reading to it
as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.plan.memory_limit import SETTING, budget, parse_bytes
from mxcore.storage.plan.progress import Progress, ProgressDisplay
from mxserver.wire.errors import MxError
from vllm_plugin import compat
from vllm_plugin.lazy_weights import LAZY_LEAST_BYTES, Needed, lazy_weights

_log = logging.getLogger(__name__)

Weights = Generator[tuple[str, torch.Tensor], None, None]


class StorageLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """One load from storage; raises what vLLM's default loader raises. `progress` hears how far it is.

    With `needed` (`lazy_weights`), only that is read, of what our reader reads; `read_bytes` counts it.
    """

    def __init__(
        self,
        load_config: LoadConfig,
        settings: WorkerSettings,
        progress: Progress = lambda done_bytes, total_bytes: None,
        needed: Needed | None = None,
    ) -> None:
        super().__init__(compat.plain_load_config(load_config, "auto"))
        self._settings = settings
        self._needed = needed
        self.read_bytes = 0
        self._progress = progress
        if settings.host_memory_limit is not None:
            budget().set_limit(parse_bytes(settings.host_memory_limit), SETTING)

    def _get_weights_iterator(self, source: Any) -> Any:
        if self._settings.storage_reader == "engine":
            return super()._get_weights_iterator(source)
        with compat.reading_safetensors_with(self._weights):
            return super()._get_weights_iterator(source)

    def _weights(self, theirs: Callable[..., Weights], files: list[str], *args: Any, **kwargs: Any) -> Weights:
        """What vLLM's own iterator over safetensors files gives, which is `theirs`; that itself where we cannot."""
        try:
            checkpoint = open_checkpoint([Path(file) for file in sorted(files)])
        except (MxError, OSError) as error:
            _log.warning("our reader cannot read these weights: %s; the engine's own does", error)
            return theirs(files, *args, **kwargs)
        names = compat.wanted_names(checkpoint, args, kwargs)
        if names is None:
            return theirs(files, *args, **kwargs)
        show = bool(args[0] if args else kwargs.get("use_tqdm_on_load", False))
        return self._ours(checkpoint, names, show)

    def _ours(self, checkpoint: Checkpoint, names: list[str], show: bool) -> Weights:
        total_bytes = sum(checkpoint[name].size_bytes for name in names)
        with ProgressDisplay("Loading safetensors") as display:

            def tell(done_bytes: int) -> None:
                self._progress(done_bytes, total_bytes)
                if show and compat.is_first_rank():
                    display(done_bytes, total_bytes)

            def count(read_bytes: int) -> None:
                self.read_bytes += read_bytes

            weights: Iterator[tuple[str, torch.Tensor]] = lazy_weights(
                checkpoint,
                set(names),
                mode=self._settings.read_mode,
                gpudirect_storage=self._settings.gpudirect_storage,
                told=tell,
                lazy_least_bytes=LAZY_LEAST_BYTES if self._needed is None else 0,
                needed=self._needed,
                read=count,
            )
            yield from weights
