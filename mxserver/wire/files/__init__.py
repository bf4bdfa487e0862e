"""Files from the server's model cache: by HTTP ranges or over gRPC, whole or partly there."""

from __future__ import annotations

from mxserver.wire.files.disk_room import full_disk_is_told
from mxserver.wire.files.file_reader import FileReader
from mxserver.wire.files.file_source import FileSource, PortState
from mxserver.wire.files.model_client import ModelClient, ModelFiles
from mxserver.wire.files.model_names import SCHEMES, Provider, name_problem, provider_of
from mxserver.wire.files.partial_file import FileInfo, has_content
from mxserver.wire.files.pieces import DIGEST_OF_LAST, FILES_FOLDER, MOST_DIGESTED_BYTES
from mxserver.wire.files.tls_records import TlsRecords

__all__ = [
    "DIGEST_OF_LAST",
    "FILES_FOLDER",
    "MOST_DIGESTED_BYTES",
    "SCHEMES",
    "FileInfo",
    "FileReader",
    "FileSource",
    "ModelClient",
    "ModelFiles",
    "PortState",
    "Provider",
    "TlsRecords",
    "full_disk_is_told",
    "has_content",
    "name_problem",
    "provider_of",
]
