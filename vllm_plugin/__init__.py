"""The plugin for vLLM: `vllm serve … --load-format mx`.

vLLM calls `register` or `register_modelexpress` in each of its processes (entry point group `vllm.general_plugins`).
Importing this package imports neither vLLM nor torch nor gRPC.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings

_log = logging.getLogger("vllm.modelexpress")  # below vLLM's logger, so that its handlers show it

__all__ = ["register", "register_modelexpress"]

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
        from vllm_plugin import compat, formats
        from vllm_plugin.load_format_names import LOAD_FORMATS, TRANSFER_BACKENDS
        from vllm_plugin.loader import MxModelLoader, prepare, prepare_offline
        from vllm_plugin.update import drain_preempted, register_transfer_engine, take_all_answers

        for name in LOAD_FORMATS:
            compat.register_loader(name, MxModelLoader)
        register_transfer_engine(TRANSFER_BACKENDS, "vllm_plugin.update.transfer_engine", "MxWeightTransferEngine")
        drain_preempted()
        take_all_answers()
        formats.warn_of_taken()
        compat.before_parsing(formats.default_format)
        compat.before_configuring(prepare, prepare_offline)
        compat.ask_for_amx()
    except Exception as error:  # noqa: BLE001 - whatever it is, vLLM must start
        _log.warning(
            "the load formats of ModelExpress could not be registered, vLLM works without them: %s",
            " ".join(f"{type(error).__name__}: {error}".split()),
        )


def register_modelexpress() -> None:
    """As `register`, by the name that manifests put into VLLM_PLUGINS: NVIDIA's package has an entry point of it too.

    Of two plugins with one name vLLM calls one. Where that is this one, NVIDIA's is called from here, first: what it
    registers stays its own, whichever of the two vLLM happens to find.
    """
    for point in importlib.metadata.entry_points(group="vllm.general_plugins", name="modelexpress"):
        if point.module != __name__:
            try:
                point.load()()
            except Exception:  # noqa: BLE001 - as vLLM does; ours goes on
                _log.exception("the plugin %s of %s failed", point.name, point.module)
    register()
