"""What a checkpoint holds: its files, tensors, dtypes and digest."""

from __future__ import annotations

from mxcore.storage.checkpoint.checkpoint import (
    INDEX_SUFFIX,
    Checkpoint,
    Stamp,
    TensorInfo,
    assembled,
    open_checkpoint,
    weight_map_of,
)
from mxcore.storage.checkpoint.content_digest import checkpoint_digest, digest_of_parts, file_part, index_part, sample
from mxcore.storage.checkpoint.dtypes import DTYPES
from mxcore.storage.checkpoint.tensor_memory import Memory, memory_of
from mxcore.storage.checkpoint.tensor_views import Framework, TensorViews

__all__ = [
    "DTYPES",
    "INDEX_SUFFIX",
    "Checkpoint",
    "Framework",
    "Memory",
    "Stamp",
    "TensorInfo",
    "TensorViews",
    "assembled",
    "checkpoint_digest",
    "digest_of_parts",
    "file_part",
    "index_part",
    "memory_of",
    "open_checkpoint",
    "sample",
    "weight_map_of",
]
