"""Variables that Ray's workers of vLLM do not get unless vLLM is told to copy them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_OUR_PREFIXES = ("MX_", "MODEL_EXPRESS_")


def lost_by_ray(vllm_config: VllmConfig, environ: Mapping[str, str]) -> str:
    """What is wrong where vLLM's workers are Ray's, who get none of our variables unless vLLM is told; else empty.

    vLLM copies some variables to them, by prefix (vllm/ray/ray_env.py).
    """
    if getattr(vllm_config.parallel_config, "distributed_executor_backend", None) != "ray":
        return ""
    if environ.get("MODEL_EXPRESS_URL") or environ.get("MX_SERVER_ADDRESS"):
        return ""
    copied = {prefix.strip() for prefix in environ.get(_RAY_COPIES, "").split(",")}
    lost = [prefix for prefix in _OUR_PREFIXES if prefix not in copied]
    if not lost:
        return ""
    return (
        f"Ray's workers do not get the variables {' and '.join(f'{prefix}*' for prefix in lost)}: they would read "
        f"storage, alone; set {_RAY_COPIES}={','.join(_OUR_PREFIXES)} where vLLM starts, or --model-loader-extra-config"
    )
