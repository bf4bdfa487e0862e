"""A vLLM model that runs, as an engine of `mxcore.engine` whose weights are replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader import base_loader

from mxcore.engine import (
    Fill,
    Kind,
    Replacement,
    Running,
    Staged,
    UriPlace,
    find_checkpoint,
    model_name,
    restore,
    update,
)
from mxcore.errors import UpdateFailed
from mxcore.exchange import PublishedVersion
from mxcore.settings import load_settings
from mxserver.wire.proto import p2p_pb2
from vllm_plugin.engine import VllmEngine
from vllm_plugin.identity import written_settings
from vllm_plugin.update import layers

__all__ = ["LiveEngine", "Version", "held", "take", "take_back"]


@dataclass(frozen=True)
class Version:
    """Which weights: those of a folder, of a revision on the hub, or of a URI: a prefix in an object store, or what is
    published (mx://NAME/VERSION). One of the three.

    `checkpoint` is their digest, for where the files are not here. `label` is what the user calls the version.
    """

    path: str = ""
    revision: str = ""
    uri: str = ""
    checkpoint: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or what is named."""
        return self.label or self.revision or self.uri or self.path

    @property
    def place(self) -> dict[str, str]:
        """The one that is named."""
        named = {"path": self.path, "revision": self.revision, "uri": self.uri}
        return {kind: where for kind, where in named.items() if where}

    @property
    def is_stored(self) -> bool:
        """Whether the URI is that of an object store."""
        return bool(self.uri) and not self.uri.startswith("mx://")

    @property
    def paths(self) -> tuple[str, ...]:
        """The rungs that have these weights, and no others."""
        return ("p2p", "uri") if self.uri else ("p2p", "cache", "engine")

    def check(self) -> None:
        """Raises UpdateFailed unless exactly one of the three is named."""
        if sum(map(bool, (self.path, self.revision, self.uri))) != 1:
            raise UpdateFailed("an update names one of path, revision and uri: which weights it is about")


class LiveEngine(VllmEngine):
    """See `mxcore.engine.Engine` and `UpdatedEngine`; made for one update."""

    def __init__(
        self,
        replacement: Replacement,
        version: Version,
        load_config: LoadConfig,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
    ) -> None:
        """Raises UpdateFailed where the version has no meaning for this model."""
        before = replacement.running.engine
        target = copy.copy(model_config)
        if version.path:
            target.model, target.revision = version.path, None
        elif version.revision:
            name = model_name(model_config.model)
            if Path(name).is_absolute():
                raise UpdateFailed(f"revision {version.revision}: {name} is a folder and has none; name another path")
            target.model, target.revision = name, version.revision
        super().__init__(load_config, vllm_config, target, "")
        if target is not model_config and model_config is not vllm_config.model_config:
            self.part = before.part
        self._replacement = replacement
        self._before = model_config
        self._version = version
        self.published = PublishedVersion.named(version.uri, load_settings(self.options, told=True))

    @property
    def options(self) -> Mapping[str, Any]:
        given = dict(super().options)
        given.pop("MX_MODEL_URI", None)
        given["model_uri"] = self._version.uri if self._version.is_stored else ""
        if report_path := given.get("report_path"):
            given["report_path"] = f"{report_path}.update"
        return given

    def building_state(self) -> Callable[[], None]:
        return self._replacement.abandon

    def build(self, fill: Fill) -> nn.Module:
        running = self._replacement.running

        def process(staged: Staged) -> None:
            running.held = layers.process(running.model, staged, self._model_config, self.device)

        with base_loader.set_default_torch_dtype(self._model_config.dtype):
            return self._replacement.build(fill, process)

    def identity(self, kind: Kind, revision: str, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        if checkpoint is None and (self._version.uri or not self.has_files):
            checkpoint = self.wanted_digest() or None
        return super().identity(kind, revision, checkpoint)

    def wanted_digest(self) -> str:
        """Of the files or objects of the version, or of what is published; else what whoever asked for the update says
        that it is, or what the engine had."""
        if self.published is not None:  # going back needs no publisher: it may have gone
            return self._replacement.checkpoint or self.published.digest
        if self._version.uri:
            place = UriPlace(self._version.uri)
            try:
                return place.digest
            finally:
                place.close()
        digest = find_checkpoint(self.model, self.revision, self.download_dir).digest()
        return digest or self._version.checkpoint or self._replacement.checkpoint

    def check_settings(self) -> None:
        """The model's configuration may not differ: an engine is made by it."""
        new = find_checkpoint(self.model, self.revision, self.download_dir)
        if self._version.path and not new.weight_files and not self.wanted_digest():
            raise UpdateFailed(
                f"{self._version.path}: no weight files are there, and no digest (checkpoint) says which are meant"
            )
        old = find_checkpoint(self._before.model, self._before.revision, self.download_dir)
        if new.folder is None or old.folder is None:
            return
        theirs, ours = (written_settings(self._model_config, found).get("file") for found in (new, old))
        if isinstance(theirs, dict) and isinstance(ours, dict) and theirs != ours:
            keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            raise UpdateFailed(
                f"the configuration of {self._version.name} differs from that of the running engine in {keys[:5]}: "
                "start an engine with it"
            )


def held(running: Running) -> Version:
    """What the model has, or had before an update failed."""
    if running.place:
        return Version(**running.place, label=running.version)
    uri, label = load_settings(running.engine.options, told=True).model_uri, running.version
    if uri:
        return Version(uri=uri, label=label)
    if running.engine.revision:
        return Version(revision=running.engine.revision, label=label)
    return Version(path=running.engine.model, label=label)


def take(
    running: Running, version: Version, vllm_config: VllmConfig, model_config: ModelConfig, *, anew: bool = False
) -> None:
    """Gives the model these weights, all of them or none; with `anew` also where it has them. Raises UpdateFailed."""
    before = held(running)
    update(
        running,
        version.name,
        lambda replacement: LiveEngine(replacement, version, vllm_config.load_config, vllm_config, model_config),
        lambda replacement: LiveEngine(replacement, before, vllm_config.load_config, vllm_config, model_config),
        paths=version.paths,
        anew=anew,
        checkpoint=running.checkpoint if version.place == before.place else "",
    )
    running.place = version.place


def take_back(running: Running, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
    """Gives a model that has lost its weights just those again. Raises UpdateFailed."""
    before = held(running)
    restore(
        running, lambda replacement: LiveEngine(replacement, before, vllm_config.load_config, vllm_config, model_config)
    )
