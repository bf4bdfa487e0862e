"""A checkpoint that is elsewhere, as tensors for an engine: ranks of a node share the reading."""

from __future__ import annotations

from functools import partial

from mxcore.engine.context import LoadContext
from mxcore.engine.protocol import Streamed
from mxcore.storage.remote import BATCH_BYTES, SHARED_BATCH_BYTES, RemoteFolder, SharedReads, open_remote, stream_remote
from mxcore.storage.signed import VerifiedFiles

__all__ = ["streamed"]


def streamed(context: LoadContext, folder: RemoteFolder) -> Streamed:
    """Reads the headers; raises MxError. Nothing of the tensors touches the disk."""
    verified = VerifiedFiles(context.signed, folder) if context.signed is not None else None
    if verified is not None:
        verified.check_others()
    checkpoint = open_remote(folder)
    ranks = context.engine.ranks_on_node()
    shared = SharedReads(folder.name, folder.files, ranks, folder.read_into)
    context.at_end.callback(shared.close)
    batch_bytes = SHARED_BATCH_BYTES if ranks > 1 else BATCH_BYTES
    through = partial(verified.stream, checkpoint) if verified is not None else None
    return Streamed(
        checkpoint,
        lambda names, progress: stream_remote(
            folder,
            checkpoint,
            names,
            read=shared.read_into,
            batch_bytes=batch_bytes,
            progress=progress,
            through=through,
        ),
        verified,
    )
