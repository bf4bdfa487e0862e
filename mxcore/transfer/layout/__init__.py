"""What a worker's weights look like, how they are cut into chunks, and which chunk comes from whom."""

from __future__ import annotations

from mxcore.transfer.layout.chunks import CHUNK_BYTES, Chunks
from mxcore.transfer.layout.digests import (
    DIGEST_BYTES,
    KINDS,
    MIXSUM,
    XXH3,
    ChunkDigests,
    Digester,
    HostDigester,
    chunk_digests,
    digest_threads,
)
from mxcore.transfer.layout.layout import Layout, LayoutTensor, LocalTensor, Manifest, Placement, build_layout
from mxcore.transfer.layout.plan import (
    ChunkRequest,
    GrantCounts,
    SwarmPlan,
    all_chunks,
    chunk_set,
    chunks_of,
    set_from_bytes,
    set_to_bytes,
)
from mxcore.transfer.layout.regions import Regions, merge_regions
from mxcore.transfer.layout.scalars import Scalars, scalars_digest, scalars_from_proto, scalars_to_proto

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "KINDS",
    "MIXSUM",
    "XXH3",
    "ChunkDigests",
    "ChunkRequest",
    "Chunks",
    "Digester",
    "GrantCounts",
    "HostDigester",
    "Layout",
    "LayoutTensor",
    "LocalTensor",
    "Manifest",
    "Placement",
    "Regions",
    "Scalars",
    "SwarmPlan",
    "all_chunks",
    "build_layout",
    "chunk_digests",
    "chunk_set",
    "chunks_of",
    "digest_threads",
    "merge_regions",
    "scalars_digest",
    "scalars_from_proto",
    "scalars_to_proto",
    "set_from_bytes",
    "set_to_bytes",
]
