"""The model cache: downloads, files, eviction. The gRPC side is mxserver.services.model."""

from __future__ import annotations

from mxserver.models import errors
from mxserver.models.cache import SharedLocks
from mxserver.models.completeness import missing_of
from mxserver.models.digests import digest_fd
from mxserver.models.downloads import DownloadJob, JobState
from mxserver.models.file_stream import FileDamaged, chunk_bytes, messages, opened_file, selected_files, spans
from mxserver.models.names import ModelKey, ModelName, checked_revision, is_commit, model_name
from mxserver.models.opened import CacheSettings, OpenCache
from mxserver.models.record import FileRecord, ModelRecord
from mxserver.models.transfer import Stopped

__all__ = [
    "CacheSettings",
    "DownloadJob",
    "FileDamaged",
    "FileRecord",
    "JobState",
    "ModelKey",
    "ModelName",
    "ModelRecord",
    "OpenCache",
    "SharedLocks",
    "Stopped",
    "checked_revision",
    "chunk_bytes",
    "digest_fd",
    "errors",
    "is_commit",
    "messages",
    "missing_of",
    "model_name",
    "opened_file",
    "selected_files",
    "spans",
]
