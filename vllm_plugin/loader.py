"""The model loader behind `--load-format mx`, `modelexpress`, `mx-source` and `mx-target` (vllm_plugin.engine).

Kept light: vLLM imports this in each of its processes. The work is in `vllm_plugin.engine`, imported when a model is
loaded.

`--model-loader-extra-config` takes the worker's settings by name (`{"server_address": "mx:8001"}`; they win over the
environment), and `report_path`: a file to which the load's report is written as JSON (`mxcore.engine.report`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_plugin import compat
from vllm_plugin.load_format_names import LOAD_FORMATS

_log = logging.getLogger("vllm.modelexpress")


class MxModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """One worker's loader; vLLM makes one for each model that it loads, and calls it from one thread."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """A model that is ready to run.

        Raises only what vLLM's default loader raises: whatever fails in ours is a line in the log, and storage. For
        mx-target there is no storage: it raises NoSource, or what keeps us from working at all.
        """
        try:
            from vllm_plugin.engine import load_model
            from vllm_plugin.update import reload_by_us
        except Exception:
            if self.load_config.load_format == "mx-target" or self._has_to_be_signed():
                raise
            _log.exception("ModelExpress cannot be used here: loading from storage, alone")
            return compat.load_model(self._storage(), vllm_config, model_config, prefix)
        model = load_model(self.load_config, vllm_config, model_config, prefix)
        reload_by_us(vllm_config)
        return model

    def download_model(self, model_config: ModelConfig) -> None:
        """As vLLM's default loader; nothing for mx-target, which has no use for files."""
        if self.load_config.load_format != "mx-target":
            self._storage().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads from storage into a model that exists, as vLLM's default loader; first we stop serving it."""
        self._withdraw()
        self._refuse_unverified()
        self._storage().load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Any], None, None]:
        """The checkpoint's tensors, with which vLLM reloads weights in place; first we stop serving them."""
        self._withdraw()
        self._refuse_unverified()
        yield from self._storage().get_all_weights(model_config, model)

    def _storage(self) -> DefaultModelLoader:
        return DefaultModelLoader(compat.plain_load_config(self.load_config, "auto"))

    def _has_to_be_signed(self) -> bool:
        """Whether MX_MODEL_SIGNATURE says so, as `mxcore.settings` understands it."""
        given = {str(name).lower(): value for name, value in (self.load_config.model_loader_extra_config or {}).items()}
        said = given.get("model_signature", given.get("mx_model_signature", os.environ.get("MX_MODEL_SIGNATURE", "")))
        return str(said).strip().lower() not in ("", "off")

    def _refuse_unverified(self) -> None:
        if self._has_to_be_signed():
            from mxcore.errors import SignatureError

            raise SignatureError(
                "weights that are loaded anew into a model are not verified, and MX_MODEL_SIGNATURE=require: "
                "nothing of them is loaded (docs/how-to/signing.md)"
            )

    def _withdraw(self) -> None:
        if serving := sys.modules.get("mxcore.engine"):  # else nothing was ever served
            serving.leave("its weights are loaded anew")


def prepare(arguments: Any) -> None:
    """Before vLLM makes a configuration of its arguments: see `vllm_plugin.configuration_process`."""
    name = str(getattr(arguments, "load_format", "")).lower()
    if name not in LOAD_FORMATS:
        return
    if compat.loader_of(name) is not MxModelLoader:
        from vllm_plugin import formats

        formats.warn_of_taken()  # by a plugin that came after ours
    elif before := _config_and_tokenizer():
        before.prepare(arguments)


def prepare_offline(model: Any, revision: Any) -> None:
    """Before vLLM looks for a model in the hub's cache alone."""
    wanted = os.environ.get("MX_MODEL_URI") or os.environ.get("MODEL_EXPRESS_NO_SHARED_STORAGE")
    if wanted and (before := _config_and_tokenizer()):
        before.prepare_offline(model, revision)


def _config_and_tokenizer() -> ModuleType | None:
    try:
        from vllm_plugin import configuration_process
    except Exception:  # noqa: BLE001 - vLLM must start; the log has the traceback
        _log.exception("ModelExpress cannot bring configuration and tokenizer here")
        return None
    return configuration_process
