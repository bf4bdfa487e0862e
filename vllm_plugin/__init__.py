"""The plugin for vLLM: `vllm serve … --load-format mx`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Importing this package
imports neither vLLM nor torch nor gRPC.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings

_log = logging.getLogger("vllm.modelexpress")  # below vLLM's logger, so that its handlers show it

__all__ = ["LOAD_FORMATS", "register"]

LOAD_FORMATS = ("mx", "mx-source", "mx-target", "modelexpress")
"""The load formats; the last only where neither vLLM (from 0.22 on) nor another package has taken the name."""

if importlib.util.find_spec("vllm") is None:
    warnings.warn(
        "vllm_plugin needs vLLM, which is not installed here: install it (pip install vllm), "
        "or use mxserver alone, which needs neither vLLM nor torch",
        RuntimeWarning,
        stacklevel=2,
    )


def register() -> None:
    """Registers our loader under `LOAD_FORMATS`; calling it again changes nothing.

    Never raises: vLLM does not catch what a plugin raises, so that every start of vLLM on this host would fail.
    Trouble is one line in the log, and vLLM says itself that the load format is unknown if somebody asks for it.
    """
    try:
        from vllm_plugin.compat import ask_for_amx, before_configuring, register_loader
        from vllm_plugin.loader import MxModelLoader, prepare, prepare_offline

        for name in LOAD_FORMATS:
            register_loader(name, MxModelLoader)
        before_configuring(prepare, prepare_offline)
        ask_for_amx()
    except Exception as error:  # noqa: BLE001 - whatever it is, vLLM must start
        _log.warning(
            "the load formats of ModelExpress could not be registered, vLLM works without them: %s",
            " ".join(f"{type(error).__name__}: {error}".split()),
        )
