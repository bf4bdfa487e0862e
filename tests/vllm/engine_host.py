"""A process that runs vLLM engines one after the other: commands as JSON lines on stdin, answers on what was stdout.

Engines after the first cost seconds instead of half a minute. What an engine's loader serves goes on being served
after the engine is gone, as the memory is the loader's. `tests.vllm.engines` is the other side.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from mxbench.demo.workers import PROMPTS

TOKENS = 10

command_state: dict[str, Any] = {}


def load(command: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine, asks it, ends it; the result has its answers, or those of its workers' method `ask`.

    Of a model that classifies the answers are its probabilities. `requests` are made beside, at once.
    """
    import vllm

    end({})
    options = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 24,
        "disable_log_stats": True,
        **command["options"],
    }
    with steps_of_the_default_loader() as steps:
        llm = vllm.LLM(model=command["model"], load_format=command["load_format"], **options)
    try:
        command_state["options"] = options
        given = answers_of(llm) if command["ask"] is None else llm.collective_rpc(command["ask"])
        if command["requests"]:
            sampling = vllm.SamplingParams(temperature=0, max_tokens=2)
            llm.generate([f"{PROMPTS[0]} {index}" for index in range(command["requests"])], sampling, use_tqdm=False)
    finally:
        command_state["engine"] = llm
        del llm
        if not command["keep"]:
            with kept_serving():
                end({})
    return {"answers": given, "steps": steps}


def answers_of(llm: Any) -> list[Any]:
    """To the prompts, by what the engine is for."""
    options = command_state["options"]
    if options.get("convert") == "classify":
        return [llm.classify([prompt], use_tqdm=False)[0].outputs.probs for prompt in PROMPTS]
    if options.get("runner") == "pooling":
        return [llm.embed([prompt], use_tqdm=False)[0].outputs.embedding for prompt in PROMPTS]
    return [_complete(llm, prompt) for prompt in PROMPTS]


@contextlib.contextmanager
def steps_of_the_default_loader() -> Iterator[dict[str, float]]:
    """Seconds of vLLM's own default loader: build, fill, process; empty when another loader was used."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_model, load_weights = DefaultModelLoader.load_model, DefaultModelLoader.load_weights
    times: list[float] = []

    @functools.wraps(load_model)
    def timed_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        times.append(time.monotonic())
        model = load_model(self, *args, **kwargs)
        times.append(time.monotonic())
        return model

    @functools.wraps(load_weights)
    def timed_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        times.append(time.monotonic())
        load_weights(self, *args, **kwargs)
        times.append(time.monotonic())

    steps: dict[str, float] = {}
    DefaultModelLoader.load_model, DefaultModelLoader.load_weights = timed_load, timed_weights
    try:
        yield steps
    finally:
        del DefaultModelLoader.load_model  # it is the base class' again
        DefaultModelLoader.load_weights = load_weights
        steps.update(
            (step, after - before)
            for step, before, after in zip(("build", "fill", "process"), times, times[1:], strict=False)
        )


def end(command: dict[str, Any]) -> dict[str, Any]:
    """Ends the engine that was kept."""
    from vllm.distributed import cleanup_dist_env_and_memory

    if "engine" in command_state:
        command_state.pop("engine").llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    return {}


def sleep(command: dict[str, Any]) -> dict[str, Any]:
    """The kept engine sleeps."""
    command_state["engine"].sleep(level=command["level"])
    return {}


def wake_up(command: dict[str, Any]) -> dict[str, Any]:
    """The kept engine wakes up, or some of its memory does."""
    command_state["engine"].wake_up(tags=command["tags"])
    return {}


def reload(command: dict[str, Any]) -> dict[str, Any]:
    """The kept engine loads its weights anew, in place; with `path` those of that folder."""
    llm = command_state["engine"]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path} if (path := command.get("path")) else {})
    llm.reset_prefix_cache()
    return {}


def update(command: dict[str, Any]) -> dict[str, Any]:
    """The kept engine takes other weights, by the weight transfer engine; `error` is what was raised, if anything."""
    llm = command_state["engine"]
    error = ""
    try:
        llm.collective_rpc("start_draft_weight_update" if command.get("draft") else "start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": command["info"]})
        llm.collective_rpc("finish_weight_update")
    except Exception as failure:  # noqa: BLE001 - the test looks at it
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    llm.reset_prefix_cache()
    return {"error": error, "states": llm.collective_rpc("mx_update_state")}


def answers(command: dict[str, Any]) -> dict[str, Any]:
    """What the kept engine answers now, as `load` has it, and the digests of its workers' parameters and buffers."""
    llm = command_state["engine"]
    return {"answers": answers_of(llm), "digests": llm.collective_rpc(digests_of)}


def digests_of(worker: Any) -> dict[str, str]:
    """Of each parameter and buffer that has bytes."""
    from mxcore.engine.weights.evidence import digest

    model = worker.model_runner.get_model()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: f"{digest(tensor):x}" for name, tensor in named.items() if tensor.numel()}


def rpc(command: dict[str, Any]) -> dict[str, Any]:
    """What each of the kept engine's workers gives for a method."""
    return {"given": command_state["engine"].collective_rpc(command["method"], args=tuple(command.get("args", ())))}


def addresses(command: dict[str, Any]) -> dict[str, Any]:
    """Where the parameters and buffers of the kept engine's workers are."""
    return {"addresses": command_state["engine"].collective_rpc(addresses_of)}


def addresses_of(worker: Any) -> dict[str, int]:
    """Of each parameter and buffer that has bytes."""
    model = worker.model_runner.get_model()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.data_ptr() for name, tensor in named.items() if tensor.numel()}


@contextlib.contextmanager
def kept_serving() -> Iterator[None]:
    """What is served outlives the engine that ends within it, so that the next one of this process has a source."""
    from mxcore.engine import serving

    members, serving._offers[:] = serving._offers[:], []
    yield
    serving._offers[:] = members


def _complete(llm: Any, prompt: str) -> Any:
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2)
    output = llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]
    probabilities = [{str(token): entry.logprob for token, entry in step.items()} for step in output.logprobs]
    return [list(output.token_ids), probabilities]


def plain_linear(command: dict[str, Any]) -> dict[str, Any]:
    """The switch with which processed weights can move on a CPU: linear layers are not packed away."""
    import torch
    import vllm.model_executor.layers.utils as layers

    if command["on"]:
        command_state.setdefault("packing", layers.dispatch_cpu_unquantized_gemm)
        layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
            layer, "cpu_linear", torch.nn.functional.linear
        )
    elif "packing" in command_state:
        layers.dispatch_cpu_unquantized_gemm = command_state["packing"]
    return {}


def hiding(command: dict[str, Any]) -> dict[str, Any]:
    """Registers the quantisation configs of tests.vllm.hiding."""
    from tests.vllm import hiding as configs

    configs.register(wider=command["wider"])
    return {}


def fork_workers(command: dict[str, Any]) -> dict[str, Any]:
    """Workers of this process' engines begin as copies of it, and import nothing: for a host that has no threads."""
    import multiprocessing

    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    for module in (multiproc_executor, utils):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    return {}


def call(command: dict[str, Any]) -> dict[str, Any]:
    """A function of the tests, `module:name`, in this process, which has vLLM and is warm."""
    import importlib

    module, _, name = command["function"].partition(":")
    return {"result": getattr(importlib.import_module(module), name)(**command.get("arguments", {}))}


def compiled(command: dict[str, Any]) -> dict[str, Any]:
    """How many graphs torch's compiler has made of models in this process so far."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"]}


def corrupt(command: dict[str, Any]) -> dict[str, Any]:
    """Flips one bit of everything that this process serves under a name."""
    import torch

    from mxcore.engine.weights import Weights
    from tests.self_checks import end_self_checks

    end_self_checks()
    flipped = 0
    for weights in [held for held in gc.get_objects() if isinstance(held, Weights)]:
        for name, tensor in weights.found.kept.items():
            if command["name"] in name and tensor.numel():
                tensor.view(-1)[:1].view(torch.uint8)[:1].bitwise_xor_(1)
                flipped += 1
    return {"flipped": flipped}


def look(command: dict[str, Any]) -> dict[str, Any]:
    """From now on, what a load looks at is written down: all that the model holds then, and what of it is a weight."""
    from mxcore.engine.weights import Weights
    from mxcore.engine.weights.evidence import digest

    take = Weights._take

    def taken(self: Weights, model: Any, found: Any, built: Any, receive: Any) -> None:
        take(self, model, found, built, receive)
        command_state["seen"] = {
            "tensors": {name: f"{digest(tensor):x}" for name, tensor in found.kept.items()},
            "numbers": found.scalars,
            "weights": sorted(self.found.kept),
            "sent": {name: value for name, value in self.scalars.items() if value is not None},
            "structure": sorted(name for name, value in self.scalars.items() if value is None),
        }

    Weights._take = taken  # type: ignore[method-assign]
    return {}


def seen(command: dict[str, Any]) -> dict[str, Any]:
    """What the last load looked at, after `look`."""
    return command_state.pop("seen")  # type: ignore[no-any-return]


def leave(command: dict[str, Any]) -> dict[str, Any]:
    """Ends all memberships of this process."""
    from mxcore.engine import serving

    return {"left": serving.leave("a test asks for it")}


def live(command: dict[str, Any]) -> dict[str, Any]:
    """How many models' weights this process holds on to."""
    from mxcore.engine.weights import Weights

    gc.collect()
    return {"weights": sum(isinstance(held, Weights) for held in gc.get_objects())}


def repack(command: dict[str, Any]) -> dict[str, Any]:
    """What tests.vllm.repacking measures."""
    from tests.vllm import repacking

    return dict(repacking.measure())


def memory(command: dict[str, Any]) -> dict[str, Any]:
    """The most bytes that this process held: on its device (None without one; torch's alone) and of the host; and the
    devices to which a load went through a pinned ring."""
    import resource

    import torch

    from mxcore.storage.load import device_ring

    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"device": on_device, "host": on_host, "ringed": sorted(device_ring._rings)}


def identity(command: dict[str, Any]) -> dict[str, Any]:
    """The identity that a real configuration gives; starts no engine."""
    from google.protobuf.json_format import MessageToDict
    from vllm import EngineArgs

    from mxcore.engine import find_checkpoint
    from mxserver.wire.calls import source_id
    from vllm_plugin.identity import source_identity

    os.environ.update(command["environ"])
    try:
        config = EngineArgs(model=command["model"], **command["options"]).create_engine_config()
        found = find_checkpoint(command["model"])
        made = source_identity(config, config.model_config, command["kind"], found, "r1")
    finally:
        for name in command["environ"]:
            del os.environ[name]
    return {"source_id": source_id(made), "identity": MessageToDict(made, preserving_proto_field_name=True)}


def interface(command: dict[str, Any]) -> dict[str, Any]:
    """What the installed vLLM has of a list of `module:name.attribute`, as tools/record_vllm_interface.py writes it."""
    import importlib
    import inspect

    absent = object()
    shapes: dict[str, Any] = {}
    for key in command["keys"]:
        module, _, path = key.partition(":")
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            fields = {field for kind in getattr(found, "__mro__", ()) for field in getattr(kind, "__annotations__", {})}
            look_up = getattr if inspect.ismodule(found) else inspect.getattr_static
            found = look_up(found, name, "there" if name in fields else absent)
        found = getattr(found, "__func__", found)  # of a class method or a static one
        is_function = inspect.isfunction(found)
        shapes[key] = _parameters(inspect.signature(found)) if is_function else None if found is absent else "there"
    return {"shapes": shapes}


def _parameters(signature: Any) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in names):
            names.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else "="
        names.append(f"{stars}{parameter.name}{default}")
    return names


def setenv(command: dict[str, Any]) -> dict[str, Any]:
    """Changes this process' environment; None unsets."""
    for name, value in command["environ"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return {}


COMMANDS = {
    function.__name__: function
    for function in (
        load,
        setenv,
        end,
        sleep,
        update,
        answers,
        rpc,
        addresses,
        wake_up,
        reload,
        plain_linear,
        hiding,
        fork_workers,
        call,
        compiled,
        corrupt,
        look,
        seen,
        leave,
        live,
        repack,
        memory,
        identity,
        interface,
    )
}


def save_seconds() -> None:
    """What costs seconds an engine and changes nothing here: half of the suite's time without it.

    Collecting walks all that vLLM has imported, a million objects, ten times an engine: those are frozen, and engines
    are not frozen with them. A model's class is inspected in a process of its own, for CUDA's sake: here it is not.
    """
    import vllm.entrypoints.llm  # noqa: F401 - all of it, now
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def main() -> None:
    """Serves commands until stdin ends."""
    faulthandler.register(signal.SIGUSR1)  # a test that gets no answer asks where all threads are
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print belongs to the log
    if "--stock" not in sys.argv:
        save_seconds()
    if os.environ.get("VLLM_PLUGINS") != "":  # without discovery a worker class has to do it
        from vllm.plugins import load_general_plugins

        import vllm_plugin

        load_general_plugins()
        vllm_plugin.register()  # once more: that must change nothing
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": True, **COMMANDS[command["command"]](command)}
        except Exception as error:  # noqa: BLE001 - the other side asserts on it
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
