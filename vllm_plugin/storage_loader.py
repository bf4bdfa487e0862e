"""vLLM's default loader, with the bytes of safetensors files read by mxcore.storage, or with tensors from elsewhere.

Which files, which names and what becomes of the tensors stay vLLM's; MX_READ_MODE=engine leaves the reading of
files to it as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mxcore.engine import Files, Source, Streamed, lazy_weights
from mxcore.errors import CheckpointError, SignatureError
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.plan import SETTING, Progress, ProgressDisplay, budget, parse_bytes
from mxserver.wire import MxError, weight_files_in
from vllm_plugin import compat

__all__ = ["StorageLoader", "opened_as_by_vllm"]

_log = logging.getLogger(__name__)

Weights = Generator[tuple[str, torch.Tensor], None, None]


class StorageLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """Fills `model` from `source`; raises what vLLM's default loader raises. `progress` hears how far it is.

    `read_bytes` counts what our reader reads of files.
    """

    def __init__(
        self, load_config: LoadConfig, settings: WorkerSettings, model: str, source: Source, progress: Progress
    ) -> None:
        super().__init__(compat.plain_load_config(load_config, "auto"))
        self._settings = settings
        self._model = model
        self._source = source
        self._progress = progress
        self.read_bytes = 0
        if settings.host_memory_limit is not None:
            budget().set_limit(parse_bytes(settings.host_memory_limit), SETTING)

    def _prepare_weights(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        folder = self._source.folder if isinstance(self._source, Files) else None
        is_ours = folder is not None and model_name_or_path == self._model
        return super()._prepare_weights(str(folder) if is_ours else model_name_or_path, *args, **kwargs)

    def _get_weights_iterator(self, source: Any) -> Any:
        if isinstance(self._source, Streamed) and source.model_or_path == self._model:
            return ((source.prefix + name, tensor) for name, tensor in self._streamed(self._source))
        verified = self._source.verified
        if self._settings.read_mode == "engine" and verified is None:
            return super()._get_weights_iterator(source)
        with compat.reading_safetensors_with(self._weights):
            return super()._get_weights_iterator(source)

    def _streamed(self, source: Streamed) -> Iterator[tuple[str, torch.Tensor]]:
        strategy = {"safetensors_load_strategy": getattr(self.load_config, "safetensors_load_strategy", None)}
        if (foreign := compat.load_strategy((), strategy)) is not None:
            raise CheckpointError(
                f"{self._model}: its tensors are made by vLLM's strategy {foreign!r}, which reads files: weights from "
                "elsewhere are not for it; give vLLM the files themselves"
            )
        experts = {"local_expert_ids": getattr(self, "local_expert_ids", None)}
        names = compat.wanted_names(source.checkpoint, (), experts)
        with self._told(show=True) as tell:
            yield from source.tensors(None if names is None else set(names), tell)

    @contextmanager
    def _told(self, *, show: bool) -> Iterator[Progress]:
        """What is called with the progress: for the server's page, and shown to who watches the engine."""
        with ProgressDisplay("Loading safetensors") as display:

            def tell(done_bytes: int, total_bytes: int) -> None:
                self._progress(done_bytes, total_bytes)
                if show and compat.is_first_rank():
                    display(done_bytes, total_bytes)

            yield tell

    def _weights(self, theirs: Callable[..., Weights], files: list[str], *args: Any, **kwargs: Any) -> Weights:
        """What vLLM's own iterator over safetensors files gives, which is `theirs`; that itself where we cannot."""
        if (foreign := compat.load_strategy(args, kwargs)) is not None:
            self._refuse_unverified(f"vLLM's strategy {foreign!r} reads the weights")
            _log.info("the weights are read by vLLM's strategy %r", foreign)
            return theirs(files, *args, **kwargs)
        try:
            checkpoint = opened_as_by_vllm([Path(file) for file in sorted(files)])
        except (MxError, OSError) as error:
            self._refuse_unverified(f"our reader cannot read these weights ({error})")
            _log.warning("our reader cannot read these weights: %s; the engine's own does", error)
            return theirs(files, *args, **kwargs)
        names = compat.wanted_names(checkpoint, args, kwargs)
        if names is None:
            self._refuse_unverified("vLLM reads a part of the weights that is not known here")
            return theirs(files, *args, **kwargs)
        return self._ours(checkpoint, names, bool(args[0] if args else kwargs.get("use_tqdm_on_load", False)))

    def _refuse_unverified(self, what: str) -> None:
        if self._source.verified is not None:
            raise SignatureError(
                f"{self._model}: {what}, so nothing would be verified (MX_MODEL_SIGNATURE): not loaded"
            )

    def _ours(self, checkpoint: Checkpoint, names: list[str], show: bool) -> Weights:
        total_bytes = sum(checkpoint[name].size_bytes for name in names)

        def count(read_bytes: int) -> None:
            self.read_bytes += read_bytes

        with self._told(show=show) as tell:
            yield from lazy_weights(
                checkpoint,
                set(names),
                mode=self._settings.reader_mode,
                gpudirect_storage=self._settings.gpudirect_storage,
                told=lambda done_bytes: tell(done_bytes, total_bytes),
                needed=self._source.needed if isinstance(self._source, Files) else None,
                record=self._source.record if isinstance(self._source, Files) else None,
                read=count,
                verified=self._source.verified,
            )


def opened_as_by_vllm(files: list[Path]) -> Checkpoint:
    """The checkpoint of the files that vLLM chose: by the folder's index, where they are all that this lists."""
    folders = {file.parent for file in files}
    if len(folders) == 1:
        chosen = weight_files_in(folder := folders.pop())
        if [folder / name for name in chosen.files] == files:
            return open_checkpoint(folder)
    return open_checkpoint(files)
