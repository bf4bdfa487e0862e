"""vLLM without kernels on a CUDA platform that is none: what a machine without a GPU can check of the kit.

python -m tools.gpu_vllm.faked_platform MODEL...   in a process of its own, with the kit's vLLM on PYTHONPATH.

NVML is replaced by one that tells of an H200; nothing runs on a device. The engine's and the worker's modules are
imported, the configuration is made with the options that the kit uses, each model is built on the meta device by the
layers that the GPU would get, and processed; where Triton is installed it compiles the engine's kernels.
Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from tools.gpu_vllm import engine_options

NAME, CAPABILITY, MEMORY_BYTES = "NVIDIA H200", (9, 0), 141 << 30


def fake_nvml() -> None:
    """NVML's calls that vLLM makes to choose and describe its platform."""
    import vllm.third_party.pynvml as nvml

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": CAPABILITY,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=MEMORY_BYTES, free=MEMORY_BYTES, used=0),
        "nvmlDeviceGetName": NAME,
        "nvmlDeviceGetUUID": "GPU-0",
    }
    for name, value in answers.items():
        setattr(nvml, name, lambda *_, value=value: value)


def fake_triton() -> bool:
    """Whether Triton is there; it then takes its NVIDIA driver for active, so that vLLM's kernels are defined."""
    with contextlib.suppress(ImportError):
        from triton.backends import backends

        backends["nvidia"].driver.is_active = staticmethod(lambda: True)
        return True
    return False


def built(model: str) -> dict[str, Any]:
    """One model on the meta device: the attention that it got, its parameters, and what processing made of them."""
    import torch
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=model, **engine_options.options(gpu=True)).create_engine_config()
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        made = initialize_model(vllm_config=config)
        before = sum(parameter.numel() for parameter in made.parameters())
        process_weights_after_loading(made, config.model_config, torch.device("meta"))
    implementations = {type(module.impl).__name__ for module in made.modules() if hasattr(module, "impl")}
    return {
        "class": type(made).__name__,
        "worker": config.parallel_config.worker_cls,
        "device": config.device_config.device_type,
        "v2_runner": config.use_v2_model_runner,
        "attention": sorted(implementations),
        "parameters": before,
        "parameters_processed": sum(parameter.numel() for parameter in made.parameters()),
    }


def distributed() -> None:
    """One process of one, as an engine has it."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.NamedTemporaryFile() as store, set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1, backend="gloo")
    torch.set_num_threads(1)


def main() -> None:
    """The check."""
    os.environ.update(engine_options.environment(gpu=True))
    fake_nvml()
    triton = fake_triton()
    import torch
    import vllm
    from vllm.platforms import current_platform

    found: dict[str, Any] = {
        "vllm": vllm.__file__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": type(current_platform).__name__,
        "triton": triton,
    }
    import vllm.entrypoints.llm
    import vllm.v1.engine.core

    if triton:  # without, vLLM's placeholders have not all that the runner's kernels ask for
        import vllm.v1.worker.gpu_model_runner
        import vllm.v1.worker.gpu_worker
    distributed()
    if triton:
        from tools.gpu_vllm.triton_kernels import compile_kernels

        found["cubin_bytes"] = compile_kernels()
    found["models"] = {name: built(name) for name in sys.argv[1:]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
