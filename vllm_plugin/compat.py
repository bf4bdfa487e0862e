"""Where vLLM's versions differ, and what of vLLM this package touches beside its loader interface.

Everything version-dependent is here and nowhere else. Run with vLLM 0.32; for 0.10 to 0.33 the shapes of what is
touched are recorded from each version's sources (tests/plugin/vllm_interface.json). Versions are met by looking, never
by comparing numbers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.distributed import parallel_state
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import default_loader, weight_utils
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from vllm_plugin import drafts

if TYPE_CHECKING:
    from mxcore.engine import EngineWatch

OUR_LOGGERS = ("vllm_plugin", "mxcore", "mxserver")


def route_logs() -> None:
    """Lets our loggers write where vLLM's do: vLLM configures the logger `vllm` alone. Idempotent."""
    engine = logging.getLogger("vllm")
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        for handler in engine.handlers:
            if handler not in logger.handlers:
                logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(engine.level or logging.INFO)
        logger.propagate = not logger.handlers


def ask_for_amx() -> None:
    """Asks the kernel for AMX's registers, which vLLM's attention on a CPU uses (0.32) and leaves to oneDNN to ask for.

    oneDNN asks at its first product on tiles: with a model too small for those the process died of SIGILL.
    """
    if current_platform.is_cpu() and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # False where the processor or the kernel has none


def loader_of(name: str) -> type[BaseModelLoader] | None:
    """The class that this vLLM takes for a load format, whosever it is; None where the format is not known."""
    found = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(name)
    return found if isinstance(found, type) else None


def register_loader(name: str, loader: type[BaseModelLoader]) -> None:
    """Registers a load format, but leaves a name alone that somebody has taken: vLLM itself, or another package.

    vLLM's own `modelexpress` (0.22 and later) is taken where it could only say that NVIDIA's package is missing.
    Raises RuntimeError before vLLM 0.10.1, which knows no names of others.
    """
    if not hasattr(model_loader, "register_model_loader"):
        raise RuntimeError(
            "this vLLM takes no load formats by name (0.10.1 and later do); "
            "in Python, LLM(load_format=vllm_plugin.loader.MxModelLoader) is the same as mx"
        )
    taken = loader_of(name)
    if taken is not None and name == "modelexpress" and taken.__module__.startswith("vllm.") and not has_theirs():
        del model_loader._LOAD_FORMAT_TO_MODEL_LOADER[name]  # else vLLM warns that it is overwritten
        taken = None
    if taken is None:
        model_loader.register_model_loader(name)(loader)


def has_theirs() -> bool:
    """Whether NVIDIA's package can be imported; a folder that happens to have its name is no package."""
    found = importlib.util.find_spec("modelexpress")
    return found is not None and found.origin is not None


def load_plugins() -> None:
    """Loads vLLM's plugins, as each of its processes does."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def before_parsing(default: Callable[[], str | None]) -> None:
    """Makes what `default()` gives the default of --load-format, in each command that takes it. Idempotent.

    What the command line says still wins. In a version that lacks the name (0.32 was tried) nothing changes.
    """
    try:
        arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    except (ImportError, AttributeError):
        return
    theirs = getattr(arguments, "add_cli_args", None)
    if theirs is None or hasattr(theirs, "theirs"):
        return

    @functools.wraps(theirs)
    def added(parser: Any, *args: Any, **kwargs: Any) -> Any:
        made = theirs(parser, *args, **kwargs)
        if (chosen := default()) is not None:
            made.set_defaults(load_format=chosen)
        return made

    added.theirs = theirs  # type: ignore[attr-defined]
    arguments.add_cli_args = staticmethod(added)


def configured(words: list[str]) -> VllmConfig:
    """vLLM's configuration for these engine arguments. Raises what vLLM raises for what it does not take."""
    arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    place = "vllm.utils.argparse_utils" if importlib.util.find_spec("vllm.utils.argparse_utils") else "vllm.utils"
    parser = importlib.import_module(place).FlexibleArgumentParser()
    made: VllmConfig = arguments.from_cli_args(arguments.add_cli_args(parser).parse_args(words)).create_engine_config()
    return made


def plain_load_config(load_config: LoadConfig, load_format: str) -> LoadConfig:
    """A copy for one of vLLM's own loaders, which reject extra keys that they do not know."""
    return dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config={})


def before_configuring(prepare: Callable[[Any], None], offline: Callable[[Any, Any], None]) -> None:
    """Calls `prepare(arguments)` before vLLM makes a configuration of its arguments, and `offline(model, revision)`
    before it replaces a model's name by its place in the hub's cache. Idempotent; in a version that lacks one of these
    names (0.32 was tried), that call is not made.
    """
    try:
        arg_utils = importlib.import_module("vllm.engine.arg_utils")
    except ImportError:
        return
    for name in ("create_engine_config", "create_model_config"):
        theirs = getattr(getattr(arg_utils, "EngineArgs", None), name, None)
        if theirs is None or hasattr(theirs, "theirs"):
            continue

        def made(self: Any, *args: Any, theirs: Callable[..., Any] = theirs, **kwargs: Any) -> Any:
            prepare(self)
            return theirs(self, *args, **kwargs)

        functools.update_wrapper(made, theirs)
        made.theirs = theirs  # type: ignore[attr-defined]
        setattr(arg_utils.EngineArgs, name, made)
    found = getattr(arg_utils, "get_model_path", None)
    if found is not None and not hasattr(found, "theirs"):

        def place(model: Any, revision: Any = None) -> Any:
            offline(model, revision)
            return found(model, revision)

        place.theirs = found  # type: ignore[attr-defined]
        setattr(arg_utils, "get_model_path", place)  # noqa: B010 - a module has no such attribute for mypy


_READING = threading.local()


@contextlib.contextmanager
def reading_safetensors_with(ours: Callable[..., Any]) -> Iterator[None]:
    """Within it, this thread's default loader takes `ours(theirs, files, …)` for vLLM's iterator over weight files.

    The default loader finds that iterator as a name of its module; without that name all stays as it is.
    """
    theirs = getattr(default_loader, _ITERATOR, None)
    if theirs is not None and not hasattr(theirs, "theirs"):

        @functools.wraps(theirs)
        def chosen(files: list[str], *args: Any, **kwargs: Any) -> Any:
            mine = getattr(_READING, "ours", None)
            return theirs(files, *args, **kwargs) if mine is None else mine(theirs, files, *args, **kwargs)

        chosen.theirs = theirs  # type: ignore[attr-defined]
        setattr(default_loader, _ITERATOR, chosen)
    _READING.ours = ours
    try:
        yield
    finally:
        _READING.ours = None


_ITERATOR = "safetensors_weights_iterator"


def wanted_names(checkpoint: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str] | None:
    """Which tensors vLLM's iterator would give with these arguments; None where we cannot tell.

    Under expert parallelism it leaves out experts of other ranks (from 0.18 on).
    """
    experts = kwargs.get("local_expert_ids", args[2] if len(args) > 2 else None)
    if experts is None:
        return list(checkpoint)
    skip = getattr(weight_utils, "should_skip_weight", None)
    return None if skip is None else [name for name in checkpoint if not skip(name, experts)]


def load_strategy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The `safetensors_load_strategy` that vLLM's iterator is called with, where it is none that ours stands for.

    Ours stands for those that only say how bytes come. "torchao" makes other tensors of them.
    """
    strategy = kwargs.get("safetensors_load_strategy", args[1] if len(args) > 1 else None)
    return None if strategy in (None, "lazy", "eager", "prefetch") else str(strategy)


def is_first_rank() -> bool:
    """Whether this process is the one that shows progress."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def load_model(loader: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> Any:
    """Calls a loader's `load_model`; `prefix` exists from vLLM 0.15.1 on, and a wrapper's `**kwargs` may hide it."""
    parameters = inspect.signature(loader.load_model).parameters.values()
    is_named = any(parameter.name == "prefix" for parameter in parameters)
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if is_named or (is_open and prefix):
        return loader.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
    return loader.load_model(vllm_config=vllm_config, model_config=model_config)


def architecture() -> str:
    """`sm_90` and the like; empty where the weights' form does not depend on the device."""
    if current_platform.is_cpu():
        return ""
    capability = current_platform.get_device_capability()
    if capability is None:
        return str(current_platform.device_name)
    return f"sm_{capability.major}{capability.minor}"


def chosen_variables(environ: Mapping[str, str], wanted: Callable[[str], object]) -> dict[str, Any]:
    """What variables of `environ` say to vLLM, by name: those that `wanted` takes and that vLLM reads otherwise than if
    they were not set. So a variable that is set to its default is as one that is not, and "1" is as "true" where vLLM
    takes both. One that vLLM does not know, or cannot read, counts by its text.

    vLLM's own functions read them, in a second copy of their module whose environment is `environ`.
    """
    names = sorted(name for name in environ if wanted(name))
    spec = importlib.util.find_spec("vllm.envs") if names else None
    if spec is None or spec.loader is None:
        return {name: environ[name] for name in names}
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    theirs = _Environment()
    vars(copied)["os"] = theirs
    chosen: dict[str, Any] = {}
    for name in names:
        values = []
        for theirs.environ in ({**environ}, {key: text for key, text in environ.items() if key != name}):
            try:
                value = copied.environment_variables[name]()
            except Exception:  # noqa: BLE001 - not known to this version, or a text that it refuses
                value = theirs.environ.get(name)
            values.append(sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        if values[0] != values[1]:
            chosen[name] = values[0]
    return chosen


class _Environment:
    """The module `os` with another environment."""

    environ: dict[str, str]

    def getenv(self, name: str, default: Any = None) -> Any:
        return self.environ.get(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def may_lose_memory(vllm_config: VllmConfig, model_config: ModelConfig) -> str | None:
    """A mode of the engine in which weights vanish or move and nobody tells us; None when there is none."""
    if is_balanced(vllm_config) and _balancer() is None:
        return "expert load balancing, whose moves cannot be heard of in this vLLM,"
    if getattr(model_config, "enable_sleep_mode", False) and worker_class(vllm_config) is None:
        return "sleep mode, with a worker class that cannot be watched,"
    return None


def is_balanced(vllm_config: VllmConfig) -> bool:
    """Whether the engine moves experts from place to place while it runs (`--enable-eplb`)."""
    return bool(getattr(vllm_config.parallel_config, "enable_eplb", False))


def balance(vllm_config: VllmConfig) -> str:
    """What expert load balancing makes of a model before it has moved anything; empty without it.

    Experts are placed in their order then, whatever the placement strategy, and scales are those of all ranks.
    """
    if not is_balanced(vllm_config):
        return ""
    settings = getattr(vllm_config.parallel_config, "eplb_config", vllm_config.parallel_config)
    return f"redundant={getattr(settings, 'num_redundant_experts', 0)}"


def _balancer() -> Any:
    """vLLM's class that moves experts, where it is known what it calls first to do so."""
    try:
        found = importlib.import_module("vllm.distributed.eplb.eplb_state").EplbState
    except (ImportError, AttributeError):
        return None
    return found if callable(getattr(found, "rearrange", None)) else None


def platform_worker() -> type:
    """The worker class that vLLM takes on this machine when none is named."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker  # type: ignore[no-any-return]
    if current_platform.is_xpu():
        from vllm.v1.worker.xpu_worker import XPUWorker

        return XPUWorker  # type: ignore[no-any-return]
    from vllm.v1.worker.gpu_worker import Worker

    return Worker  # type: ignore[no-any-return]


def engine_of(vllm_config: VllmConfig | None) -> str:
    """Which of a process' engines this is the configuration of; empty where that cannot be said.

    `vllm serve` (0.32) gives a configuration another id once its engine has loaded, and so does each copy, with which
    drafts are loaded: the first one asked for stays. All copies of an engine's configuration have one
    `compilation_config`, in which its layers enter themselves; what was said is kept by that.
    """
    if vllm_config is None:
        return ""
    shared = getattr(vllm_config, "compilation_config", None) or vllm_config
    key = id(shared)
    if key not in _first_ids:
        _first_ids[key] = str(getattr(vllm_config, "instance_id", ""))
        weakref.finalize(shared, _first_ids.pop, key, None)
    return _first_ids[key]


_first_ids: dict[int, str] = {}
"""What `engine_of` said first, by the id of what the configurations of an engine that is alive share."""


FIRST_MOVE = "its first rearrangement of experts, --enable-eplb"
_TRANSFERS = ("start_weight_update", "update_weights", "finish_weight_update")
"""By weight transfer engines: ours ends offers itself, when the first byte is written."""

_CHANGES = (
    "reload_weights",
    *_TRANSFERS,
    "reset_weights",
    "discard",
    "checkpoint_prepare",
    "checkpoint_restore",
    "elastic_ep_execute",
)


def worker_class(vllm_config: VllmConfig) -> type | None:
    """The engine's worker class in this process; None when it is not one that can sleep, or not known by name."""
    module, _, name = str(vllm_config.parallel_config.worker_cls).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and hasattr(found, "sleep") and hasattr(found, "wake_up") else None


def watch_worker(vllm_config: VllmConfig, watch: EngineWatch) -> bool:
    """Has `watch` told before the worker sleeps, changes its weights or ends, and after it woke up. Idempotent.

    vLLM offers no event for that; each is a method of the worker, which is wrapped. One that is called in a way that
    is not known here, or a `watch` that raises, ends the engine's offers: nobody can say what becomes of its memory.
    False when there is no worker class to watch.

    Before experts are moved for the first time, all offers of this process end: who moves them knows no engine.
    """
    if is_balanced(vllm_config) and (balancer := _balancer()) is not None:

        def moving(engine: str, *_args: Any, is_profile: bool = False, **_kwargs: Any) -> None:
            if not is_profile:  # that one measures memory and moves nothing
                watch.changing(engine, FIRST_MOVE)

        _wrap(balancer, watch, "rearrange", before=moving)
    kind = worker_class(vllm_config)
    if kind is None:
        return False
    _wrap(kind, watch, "sleep", before=lambda engine, level=1: watch.sleeping(engine, level))
    _wrap(kind, watch, "wake_up", after=lambda engine, tags=None: watch.awake(engine, tags))
    _wrap(kind, watch, "shutdown", before=watch.ending)
    for name in _CHANGES:
        _wrap(kind, watch, name, before=lambda engine, *_args, _name=name, **_kwargs: watch.changing(engine, _name))
    return True


def _wrap(
    kind: Any,
    watch: EngineWatch,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    method = getattr(kind, name, None)
    if method is None or hasattr(method, "watched"):
        return

    def tell(listener: Callable[..., None] | None, engine: str, *args: Any, **kwargs: Any) -> None:
        if listener is not None:
            try:
                listener(engine, *args, **kwargs)
            except Exception:
                logging.getLogger("vllm.modelexpress").exception("hearing of the engine's %s failed", name)
                watch.changing(engine, f"{name}, called in a way that is not known here")

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _TRANSFERS and getattr(getattr(self, "weight_transfer_engine", None), "ends_offers", False):
            return method(self, *args, **kwargs)
        engine = engine_of(getattr(self, "vllm_config", None))
        tell(before, engine, *args, **kwargs)
        result = method(self, *args, **kwargs)
        tell(after, engine, *args, **kwargs)
        return result

    watched.watched = True  # type: ignore[attr-defined]
    setattr(kind, name, watched)


def building_state(vllm_config: VllmConfig) -> Callable[[], None]:
    """Remembers what building a model registers in the configuration; the result restores it.

    Layers enter themselves by name (`static_forward_context` and its kind) and refuse a name that exists, so that a
    second model can only be built after the first one's entries are gone.
    """
    owner = vllm_config.compilation_config
    containers = [(value, copy.copy(value)) for value in vars(owner).values() if isinstance(value, dict | list | set)]

    def restore() -> None:
        for value, before in containers:
            value.clear()
            if isinstance(value, list):
                value.extend(before)
            else:
                value.update(before)

    return restore


def has_experts(model_config: ModelConfig) -> bool:
    """Whether the model is a mixture of experts: by vLLM (from 0.11 on), or by a setting of the model's that says so.

    Better one model too many, whose replicas then share nothing, than one whose parts are mixed up.
    """
    count = getattr(model_config, "get_num_experts", None)
    settings = getattr(model_config, "hf_text_config", model_config.hf_config).to_dict()
    return bool(count and count() > 0) or any("expert" in name and value for name, value in settings.items())


def context_parallel_size(vllm_config: VllmConfig) -> int:
    """Ranks that share one prompt (from 0.12 on); 1 elsewhere."""
    return int(getattr(vllm_config.parallel_config, "prefill_context_parallel_size", 1))


def context_rank() -> int:
    """This worker's place among the ranks that share one prompt; 0 where there are none."""
    group = getattr(parallel_state, "get_pcp_group", None)
    return 0 if group is None else int(group().rank_in_group)


def world_size(vllm_config: VllmConfig, model_config: ModelConfig) -> int:
    """Workers that hold one copy of the model: experts are spread over data and context parallelism as well."""
    parallel = vllm_config.parallel_config
    size = parallel.tensor_parallel_size * (
        1 if drafts.is_draft(vllm_config, model_config) else parallel.pipeline_parallel_size
    )
    if has_experts(model_config):
        size *= parallel.data_parallel_size * context_parallel_size(vllm_config)
    return int(size)
