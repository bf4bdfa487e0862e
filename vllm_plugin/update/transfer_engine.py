"""The weight transfer engine `mx` of vLLM: `--weight-transfer-config '{"backend": "mx"}'` with `--load-format mx`.

vLLM makes one in each worker. `start_weight_update`, then `update_weights` with one of `UpdateInfo`'s places, then
`finish_weight_update`: all of the work is in the middle one, so that the processes of an engine cannot differ in
whether an update is under way. Requests must be paused around it: `vllm_plugin.route.endpoint` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from mxcore.engine import Running, has_version, running_of
from mxcore.errors import UpdateFailed
from vllm_plugin import compat
from vllm_plugin.update.live_engine import LiveEngine, Version, held, take
from vllm_plugin.update.registering import add_worker_method

__all__ = ["InitInfo", "MxWeightTransferEngine", "UpdateInfo"]


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing is to be said before the first update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which weights: one of `path` (a folder), `revision` (of the model's name on the hub), `uri` (s3://, gs://, az://;
    mx://NAME/VERSION for what is published).

    `version` is what the version is called from then on, `checkpoint` the digest of its weights, which has to be known
    for a `path` whose files are not on this machine (the state of an engine that has them says it).
    """

    path: str = ""
    revision: str = ""
    uri: str = ""
    version: str = ""
    checkpoint: str = ""


class MxWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]  # vLLM is not type-checked
    """One worker's. All calls come from the worker's thread."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = True
    ends_offers = True
    """`compat.watch_worker`: offers end when the first byte is written, not with the first call."""

    def __init__(self, config: Any, vllm_config: VllmConfig, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        add_worker_method(vllm_config, "mx_update_state", _state)
        add_worker_method(vllm_config, "mx_has_version", _has_version)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing."""

    def start_weight_update(self) -> None:
        """Nothing: what runs is whole until `update_weights`. Raises UpdateFailed for a model that is not ours."""
        self._running()

    def has_version(self, update_info: UpdateInfo) -> bool:
        """Whether the model has these weights, while it runs; the version is called as they are then.

        Raises UpdateFailed where it cannot take them, as far as that is known before.
        """
        running, version = self._running(), _version(update_info)
        load_config = self.vllm_config.load_config
        is_there = has_version(
            running,
            version.name,
            lambda replacement: LiveEngine(replacement, version, load_config, self.vllm_config, self.model_config),
        )
        if is_there:
            running.place = version.place
        return is_there

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Takes the weights, all of them or none. Raises UpdateFailed, which says what the model has now."""
        running, version = self._running(), _version(update_info)
        take(running, version, self.vllm_config, self.model_config)

    def finish_weight_update(self) -> None:
        """Raises UpdateFailed where the model is not whole."""
        running = self._running()
        if not running.is_whole:
            raise UpdateFailed(running.trouble)

    def shutdown(self) -> None:
        """Nothing: what is served ends with the worker."""

    def _running(self) -> Running:
        instance = compat.engine_of(self.vllm_config)
        part = "" if self.model is self._default_model else "draft"
        running = running_of(instance, part)
        if running is None:
            raise UpdateFailed(
                "this model was not loaded by ModelExpress: start the engine with --load-format mx beside "
                '--weight-transfer-config \'{"backend": "mx"}\''
            )
        return running


def _version(info: UpdateInfo) -> Version:
    """Raises UpdateFailed unless exactly one place is named."""
    version = Version(info.path, info.revision, info.uri, info.checkpoint, info.version)
    version.check()
    return version


def _state(worker: Any, expected: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Of the worker's model and its draft: for `collective_rpc("mx_update_state")`.

    With `expected`, versions by part, raises UpdateFailed where one is another, or not whole: of several engines behind
    one API (data parallelism) vLLM gives the first one's answer alone, and everybody's errors.
    """
    instance = compat.engine_of(worker.vllm_config)
    found = [running for part in ("", "draft") if (running := running_of(instance, part)) is not None]
    for running in found:
        running.place = running.place or held(running).place
        if expected is not None and not (running.is_whole and expected.get(running.engine.part) == running.version):
            raise UpdateFailed(
                f"not all engines have one version, or not all are whole: {running.version} here, "
                f"{expected.get(running.engine.part)} elsewhere; {running.trouble}"
            )
    return {"models": [running.state() for running in found]}


def _has_version(worker: Any, update_info: dict[str, Any]) -> bool:
    """For `collective_rpc("mx_has_version")`. Raises UpdateFailed."""
    engine = worker.weight_transfer_engine
    with set_current_vllm_config(worker.vllm_config):
        return bool(engine.has_version(engine.parse_update_info(update_info)))
