"""vLLM as `mxcore.engine` sees an engine: one load of one model in one worker. What depends on versions is in `compat`.

vLLM builds, fills, processes and finishes a model in `BaseModelLoader.load_model`. Nothing of that is repeated here: a
loader is given to it whose part of the work, filling, is done by whoever asked for the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.distributed import get_world_group, parallel_state
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.platforms import current_platform

from mxcore.agreement import Gather
from mxcore.engine import (
    EngineWatch,
    Fill,
    Kind,
    Role,
    Source,
    find_checkpoint,
    forget,
    gather_over_gloo,
    load_running,
)
from mxcore.settings import WorkerSettings, load_settings
from mxcore.storage.plan import Progress
from mxserver.wire.proto import p2p_pb2
from vllm_plugin import compat, drafts
from vllm_plugin.identity import source_identity, worker_rank
from vllm_plugin.ray_variables import lost_by_ray
from vllm_plugin.storage_loader import StorageLoader

__all__ = ["MX", "MX_SOURCE", "MX_TARGET", "VllmEngine", "load_model", "role_of"]

MX = Role("mx", pulls=True, reads_storage=True, offers=True)
MX_SOURCE = Role("mx-source", pulls=False, reads_storage=True, offers=True, is_fixed=True)
MX_TARGET = Role(
    "mx-target",
    pulls=True,
    reads_storage=False,
    offers=False,
    otherwise="Start a worker with --load-format mx-source, or one with mx and MX_SOURCE_KEEP=raw; "
    "--load-format mx goes to storage when there is none",
    is_fixed=True,
)
"""`mx-source` reads storage and offers raw weights, it never pulls; `mx-target` only pulls raw weights, waits for a
source as long as it has to, and never reads storage. Raw weights are what was loaded, before the engine processed it:
source and target may differ in the engine's version, the accelerator and the kernels."""

_DRAFT_WITH_FILES = Role("mx-target", pulls=True, reads_storage=True, offers=False, is_fixed=True)
"""A draft at `mx-target` whose files are here: the source may well run without a draft."""

_SMALL = 2.0**-6  # a value of every floating-point type but those of four bits, which torch cannot fill
_log = logging.getLogger(__name__)


def role_of(load_format: object) -> Role:
    """The role by the load format; of whatever is no name of a fixed role, that of `mx`."""
    return next((role for role in (MX_SOURCE, MX_TARGET) if role.load_format == load_format), MX)


def load_model(
    load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
) -> nn.Module:
    """Loads a model; raises what vLLM's default loader raises, LoadPathsExhausted where that is left out, NoSource."""
    compat.route_logs()
    if lost := lost_by_ray(vllm_config, os.environ):
        _log.warning("%s", lost)
    if not drafts.has_weights(vllm_config, model_config):
        loader = DefaultModelLoader(compat.plain_load_config(load_config, "auto"))
        return compat.load_model(loader, vllm_config, model_config, prefix)
    engine, role = VllmEngine(load_config, vllm_config, model_config, prefix), role_of(load_config.load_format)
    if engine.part and role is MX_TARGET and engine.has_files:
        role = _DRAFT_WITH_FILES
    model = load_running(engine, role)
    engine.watch(EngineWatch())
    return model


class VllmEngine:
    """See `mxcore.engine.Engine`."""

    own_loader = "vLLM's default loader"

    def __init__(
        self, load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> None:
        self._load_config = load_config
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._prefix = prefix
        self.model: str = model_config.model
        self.revision: str | None = model_config.revision
        self.download_dir: str | None = load_config.download_dir
        self.instance = compat.engine_of(vllm_config)
        self.part = "draft" if drafts.is_draft(vllm_config, model_config) else ""
        device = torch.device(vllm_config.load_config.device or vllm_config.device_config.device)  # as BaseModelLoader
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        self.device = device

    @property
    def options(self) -> Mapping[str, Any]:
        given = self._load_config.model_loader_extra_config or {}
        if self.part and self.model != drafts.drafted_model(self._vllm_config):
            own = {"model_uri": "", "model_revision": ""}  # these are about the engine's own model, by whichever name
            if Path(load_settings(given, told=True).model_signature_file).is_absolute():
                own["model_signature_file"] = "model.sig"
            return {**own, **{name: value for name, value in given.items() if name not in own}}
        return given

    @property
    def has_files(self) -> bool:
        """Whether the model's weight files are on this machine."""
        return bool(find_checkpoint(self.model, self.revision, self.download_dir).weight_files)

    @property
    def accelerator(self) -> str:
        return "cpu" if current_platform.is_cpu() else str(current_platform.get_device_name())

    @property
    def configuration(self) -> Sequence[object]:
        groups = [held for held in vars(parallel_state).values() if isinstance(held, parallel_state.GroupCoordinator)]
        return self._vllm_config, self._model_config, current_platform, *groups

    @property
    def processed_weights_move(self) -> bool:
        """Not on vLLM's CPU build, which packs linear weights into objects that nothing can read back."""
        return not current_platform.is_cpu()

    def building_state(self) -> Callable[[], None]:
        return compat.building_state(self._vllm_config)

    def build(self, fill: Fill) -> nn.Module:
        loader = _Filled(self._load_config, fill)
        return compat.load_model(loader, self._vllm_config, self._model_config, self._prefix)

    def fill(self, model: nn.Module, source: Source, settings: WorkerSettings, progress: Progress) -> int:
        loader = StorageLoader(self._load_config, settings, self.model, source, progress)
        loader.load_weights(model, self._model_config)
        return loader.read_bytes

    def fill_placeholder(self, model: nn.Module) -> None:
        """One small value everywhere, where processing reads values: quantisation does arithmetic with them.

        Elsewhere what is in fresh memory does no harm: all of it is overwritten, and a layout that came out different
        for it is refused. Layers whose weights have no memory yet only vLLM's own loaders know how to fill.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            dummy = DummyModelLoader(compat.plain_load_config(self._load_config, "dummy"))
            dummy.load_weights(model, self._model_config)
        elif self._model_config.quantization is not None:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    if tensor.is_floating_point() and not str(tensor.dtype).startswith("torch.float4"):
                        tensor.fill_(_SMALL)

    def finish_filling(self, model: nn.Module) -> None:
        """Some models make tensors of others, or set flags, at the end of `load_weights`."""
        try:
            loading: Any = model
            loading.load_weights(iter(()))
        except Exception as error:  # noqa: BLE001 - it asks for tensors: then it has no end that does without
            _log.debug("%s does not finish its loading without tensors: %s", type(model).__name__, error)

    def identity(self, kind: Kind, revision: str, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        found = find_checkpoint(self.model, self.revision, self.download_dir)
        return source_identity(self._vllm_config, self._model_config, kind, found, revision, checkpoint)

    def rank(self) -> int:
        return worker_rank(self._vllm_config, self._model_config)

    def world_size(self) -> int:
        return compat.world_size(self._vllm_config, self._model_config)

    def ranks_on_node(self) -> int:
        parallel = self._vllm_config.parallel_config
        if self.part and parallel.pipeline_parallel_size > 1:  # only the last stage's have a draft
            return 1
        try:
            return int(parallel.local_world_size)  # data parallelism aside
        except AttributeError:  # before vLLM had engines over several nodes without Ray
            return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)

    def barrier(self, timeout_seconds: float) -> str:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return ""
        if self.part and self._vllm_config.parallel_config.pipeline_parallel_size > 1:
            return ""
        group, limit = get_world_group().cpu_group, timedelta(seconds=max(timeout_seconds, 1.0))
        try:
            torch.distributed.monitored_barrier(group, limit, wait_all_ranks=True)
        except RuntimeError as error:
            return " ".join(str(error).split())
        return ""

    def siblings(self) -> Gather | None:
        """All of vLLM's world, over a CPU group of its own: tensor, pipeline, and data parallelism with experts."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return None
        ranks = drafts.loading_ranks(self._vllm_config, self._model_config)
        return gather_over_gloo(ranks) if len(ranks) > 1 else None

    def offers_until(self) -> str:
        return compat.FIRST_MOVE if compat.is_balanced(self._vllm_config) else ""

    def loses_memory(self) -> str | None:
        return compat.may_lose_memory(self._vllm_config, self._model_config)

    def watch(self, watch: EngineWatch) -> None:
        compat.watch_worker(self._vllm_config, _Watch())


class _Watch(EngineWatch):
    """What this process' models are is forgotten when their engine ends."""

    def ending(self, engine: str) -> None:
        forget(engine)
        super().ending(engine)


class _Filled(BaseModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """Has `fill` called where vLLM wants weights."""

    def __init__(self, load_config: LoadConfig, fill: Fill) -> None:
        super().__init__(load_config)
        self._fill = fill

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: whoever fills knows where from."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """What `fill` does, and raises."""
        self._fill(model)
