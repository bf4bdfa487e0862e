"""What a checkpoint holds: its files, tensors, dtypes and digest."""

from __future__ import annotations

from mxcore.storage.checkpoint.checkpoint import (
    INDEX_SUFFIX,
    Checkpoint,
    TensorInfo,
    assembled,
    open_checkpoint,
    weight_map_of,
)
from mxcore.storage.checkpoint.content_digest import (
    checkpoint_digest,
    digest_of_parts,
    file_part,
    group_digest,
    groups_of,
    index_part,
)
from mxcore.storage.checkpoint.dtypes import DTYPES
from mxcore.storage.checkpoint.known_digests import known_by_versions
from mxcore.storage.checkpoint.tensor_memory import Memory, memory_of
from mxcore.storage.checkpoint.tensor_views import Framework, TensorViews, chosen_framework, refuse_unknown

__all__ = [
    "DTYPES",
    "INDEX_SUFFIX",
    "Checkpoint",
    "Framework",
    "Memory",
    "TensorInfo",
    "TensorViews",
    "assembled",
    "checkpoint_digest",
    "chosen_framework",
    "digest_of_parts",
    "file_part",
    "group_digest",
    "groups_of",
    "index_part",
    "known_by_versions",
    "memory_of",
    "open_checkpoint",
    "refuse_unknown",
    "weight_map_of",
]
