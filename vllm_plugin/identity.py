"""A vLLM configuration → what must match for two workers' weights to be interchangeable (wire.md, SourceIdentity).

Two workers whose settings make vLLM lay weights out differently must not meet: shapes can be equal where contents are
not (shuffled or swizzled kernels, KV cache scales). What decides that is hashed into `extra_parameters`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from mxcore.engine import CheckpointFiles, find_checkpoint, model_name
from mxcore.transfer.member import PROTOCOL_VERSION
from mxserver.wire.proto import p2p_pb2
from vllm_plugin import compat, drafts

# Of the names that vLLM reads, those that choose a kernel, and with it the form of processed weights.
_KERNEL_VARIABLES = re.compile(
    r"VLLM_.*(AITER|AMX|ATTENTION|BACKEND|BATCH_INVARIANT|CUTLASS|DEEP_?GEMM|FLASHINFER|FP[48]|KERNEL|MACHETE|MARLIN|"
    r"MLA|MOE|N_CONTIG|PADDING|PREPACK|QUANT|SCALE|SGL|SHUFFLE|SWIZZLE|TRITON|TRTLLM|ZENTORCH)"
)
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash")


def source_identity(
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    kind: str,
    checkpoint: CheckpointFiles,
    revision: str = "",
    known_digest: str | None = None,
) -> p2p_pb2.SourceIdentity:
    """The identity; `kind` is "processed" or "raw", `revision` what the settings say where the engine names none.

    `known_digest` is that of weights which come from elsewhere; it is taken instead of that of the files. Without
    either `extra_parameters["checkpoint"]` is empty. Raw weights do not depend on the engine, torch, CUDA or the
    device: their identity leaves these out. Raises MxError when a weight file is malformed.
    """
    parallel = vllm_config.parallel_config
    identity = p2p_pb2.SourceIdentity(
        mx_version=PROTOCOL_VERSION,
        mx_source_type=p2p_pb2.MX_SOURCE_TYPE_WEIGHTS,
        model_name=model_name(model_config.model),
        backend_framework=p2p_pb2.BACKEND_FRAMEWORK_VLLM,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel_size=_expert_parallel_size(vllm_config),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization or "",
        extra_parameters={
            "layout": kind,
            "checkpoint": checkpoint.digest() if known_digest is None else known_digest,
            "config": digest(written_settings(model_config, checkpoint)),
            "engine": "",
        },
        revision=checkpoint.commit or model_config.revision or revision,
    )
    if experts := split_of_experts(vllm_config, model_config):
        identity.extra_parameters["experts"] = experts
    if draft := drafts.draft_of(vllm_config, model_config):
        identity.extra_parameters["draft"] = draft
    if kind == "processed":
        identity.extra_parameters["config"] = digest(model_settings(model_config))
        identity.extra_parameters["engine"] = digest(engine_settings(vllm_config, os.environ))
        identity.backend_framework_version = vllm.__version__
        identity.torch_version = torch.__version__
        identity.cuda_version = torch.version.cuda or ""
        identity.gpu_arch = compat.architecture()
    return identity


def identities_of(model: str, arguments: Sequence[str]) -> list[p2p_pb2.SourceIdentity]:
    """Of a worker that `vllm serve MODEL ARGUMENTS…` would start here: of its raw weights, then of its processed ones.

    Makes vLLM's configuration, and no engine. Raises what vLLM raises for arguments that it does not take.
    """
    config = compat.configured(["--model", model, *arguments])
    chosen = config.model_config
    found = find_checkpoint(chosen.model, chosen.revision, config.load_config.download_dir)
    return [source_identity(config, chosen, kind, found) for kind in ("raw", "processed")]


def worker_rank(vllm_config: VllmConfig, model_config: ModelConfig) -> int:
    """Which part of the model this worker holds.

    Counted over pipeline and tensor parallelism; where the model has experts over data and context parallelism too,
    whose ranks hold different parts of them, with expert parallelism and without.
    """
    parallel = vllm_config.parallel_config
    stage, stages = get_pp_group().rank_in_group, parallel.pipeline_parallel_size
    if drafts.is_draft(vllm_config, model_config):  # whole at the last stage
        stage, stages = 0, 1
    rank = stage * parallel.tensor_parallel_size + get_tensor_model_parallel_rank()
    if compat.has_experts(model_config):
        replica = parallel.data_parallel_rank * compat.context_parallel_size(vllm_config) + compat.context_rank()
        rank += replica * parallel.tensor_parallel_size * stages
    return int(rank)


def split_of_experts(vllm_config: VllmConfig, model_config: ModelConfig) -> str:
    """How experts are spread beyond tensor parallelism; empty where they are not, or the model has none.

    The parts have equal shapes however they are chosen, so that no layout tells them apart.
    """
    if not compat.has_experts(model_config):
        return ""
    parallel = vllm_config.parallel_config
    sizes = parallel.data_parallel_size, compat.context_parallel_size(vllm_config)
    placement = str(getattr(parallel, "expert_placement_strategy", "linear")) if parallel.enable_expert_parallel else ""
    balance = compat.balance(vllm_config)
    if max(sizes) == 1 and placement in ("", "linear") and not balance:
        return ""
    return f"data={sizes[0]} context={sizes[1]} placement={placement}" + (f" {balance}" if balance else "")


def model_settings(model_config: ModelConfig) -> dict[str, Any]:
    """The model's own configuration, overrides of the command line included, without where it was found."""
    values = model_config.hf_config.to_dict()
    return {key: value for key, value in values.items() if key not in _NOT_OF_THE_MODEL}


def written_settings(model_config: ModelConfig, checkpoint: CheckpointFiles) -> dict[str, Any]:
    """The model's configuration as its files have it, which no version of transformers or vLLM has added to.

    Overrides of the command line are part of it: they change what is computed from it, such as rotary caches. Without
    the file, the engine's own view of it has to do.
    """
    try:
        written = json.loads((checkpoint.folder / "config.json").read_bytes()) if checkpoint.folder else None
    except (OSError, ValueError):
        written = None
    if not isinstance(written, dict):
        return model_settings(model_config)
    overrides = getattr(model_config, "hf_overrides", None) or {}
    return {
        "file": {key: value for key, value in written.items() if key not in _NOT_OF_THE_MODEL},
        "overrides": getattr(overrides, "__qualname__", overrides),  # vLLM's own, of drafts, are a function
    }


def engine_settings(vllm_config: VllmConfig, environ: Mapping[str, str]) -> dict[str, Any]:
    """What makes vLLM choose kernels, and so the form of weights after processing."""
    settings: dict[str, Any] = {
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "kv_scales": getattr(vllm_config.cache_config, "calculate_kv_scales", None),
        "quantization": getattr(vllm_config.model_config, "quantization_config", None),
        "environment": compat.chosen_variables(environ, _KERNEL_VARIABLES.match),
    }
    for part in ("attention_config", "kernel_config"):
        chosen = getattr(vllm_config, part, None)
        backends = vars(chosen) if chosen is not None else {}
        settings[part] = {name: value for name, value in backends.items() if "backend" in name}
    return settings


def digest(values: Any) -> str:
    """A short digest of settings: JSON with sorted keys, what JSON does not know by its text."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _expert_parallel_size(vllm_config: VllmConfig) -> int:
    parallel = vllm_config.parallel_config
    if not parallel.enable_expert_parallel:
        return 0
    context = compat.context_parallel_size(vllm_config)
    return int(parallel.data_parallel_size * parallel.tensor_parallel_size * context)
