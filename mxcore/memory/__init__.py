"""Host memory: aligned and pinned buffers, their DLPack export, sorted and merged address ranges."""

from __future__ import annotations

from mxcore.memory.buffers import Uint64Buffer
from mxcore.memory.descriptors import merge_adjoining, merge_extents
from mxcore.memory.host_buffer import HostBuffer

__all__ = ["HostBuffer", "Uint64Buffer", "merge_adjoining", "merge_extents"]
