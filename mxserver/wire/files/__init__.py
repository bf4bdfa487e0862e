"""Files from the server's model cache: a client for streams over HTTP/2, whole or partly there."""

from __future__ import annotations

from mxserver.wire.files.disk_room import full_disk_is_told
from mxserver.wire.files.file_chunk import ChunkReader
from mxserver.wire.files.file_reader import FileReader
from mxserver.wire.files.model_client import ModelClient, ModelFiles, provider_of
from mxserver.wire.files.model_stream import METHOD
from mxserver.wire.files.partial_file import has_content
from mxserver.wire.files.stream_call import StreamConnection

__all__ = [
    "METHOD",
    "ChunkReader",
    "FileReader",
    "ModelClient",
    "ModelFiles",
    "StreamConnection",
    "full_disk_is_told",
    "has_content",
    "provider_of",
]
