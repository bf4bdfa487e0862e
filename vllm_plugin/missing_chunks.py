"""The rest of a model from storage, where a transfer ended early: only the bytes whose chunks did not come are read.

vLLM's own loader runs over the model once more, with tensors that are read where they are copied into memory that is
still missing (`lazy_weights`). What it copies into verified chunks is not read; what it does without a plain copy is
read and done as ever. Afterwards every chunk must be what the workers' digests promise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from vllm.config import LoadConfig, ModelConfig

from mxcore.errors import ReceivedInPart
from mxcore.settings import WorkerSettings
from mxcore.transfer.receive.receiver import ReceiveReport
from vllm_plugin.missing_bytes import MissingBytes
from vllm_plugin.storage_loader import StorageLoader

__all__ = ["Filled", "fill_missing"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filled:
    """A model that is complete. `read_bytes` came out of files."""

    report: ReceiveReport
    read_bytes: int


def fill_missing(
    partial: ReceivedInPart,
    model: nn.Module,
    load_config: LoadConfig,
    model_config: ModelConfig,
    settings: WorkerSettings,
) -> Filled:
    """Reads what is missing of `model`, whose memory `partial` is about.

    Raises DigestMismatch when the memory is not what the workers had (other files, a loader that does more than
    copying), and what vLLM's default loader raises: then the model is to be built anew.
    """
    _log.warning(
        "%d of %d bytes did not come from workers: they are read from storage",
        partial.missing_bytes,
        partial.total_bytes,
    )
    loader = StorageLoader(load_config, settings, needed=MissingBytes(partial.missing_stretches()).rows)
    loader.load_weights(model, model_config)
    return Filled(partial.complete(), loader.read_bytes)
