"""What a holder says that its weights are."""

from __future__ import annotations

from mxcore.errors import DigestMismatch
from mxcore.transfer.layout import Layout, Manifest, scalars_digest, scalars_from_proto
from mxcore.transfer.move import Source, SourceClient

__all__ = ["manifest_of"]


def manifest_of(source: Source, *, timeout_seconds: float) -> Manifest:
    """Asks the holder. Raises SourceUnreachable, SourceRefused, DigestMismatch, LayoutMismatch."""
    with SourceClient(source, timeout_seconds=timeout_seconds) as client:
        answer = client.get_layout("")
    scalars = scalars_from_proto(answer.scalars)
    if scalars_digest(scalars) != answer.scalars_digest:
        raise DigestMismatch(f"worker {source.worker_id}: the scalars are not those that their digest promises")
    return Manifest(Layout.from_proto(answer.layout), scalars, answer.chunk_bytes)
