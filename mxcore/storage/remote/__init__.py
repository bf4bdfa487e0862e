"""Checkpoints that lie elsewhere: object stores, the server's model cache, the hub's cache."""

from __future__ import annotations

from mxcore.storage.remote.hub_folder import hub_cache, listing_commit, place_in_hub_cache, place_of_state, state_of
from mxcore.storage.remote.local_folder import LocalFolder
from mxcore.storage.remote.model_uri import OBJECT_SCHEMES, ModelUri, missing_packages, parse_model_uri
from mxcore.storage.remote.object_store import ObjectFolder
from mxcore.storage.remote.remote_folder import (
    BATCH_BYTES,
    RemoteFile,
    RemoteFolder,
    RemoteRange,
    is_small,
    open_remote,
    pull_small_files,
    remote_digest,
    stream_remote,
)
from mxcore.storage.remote.server_cache import ServerFolder, has_weights, same_files_here
from mxcore.storage.remote.shared_reads import SHARED_BATCH_BYTES, SharedReads

__all__ = [
    "BATCH_BYTES",
    "OBJECT_SCHEMES",
    "SHARED_BATCH_BYTES",
    "LocalFolder",
    "ModelUri",
    "ObjectFolder",
    "RemoteFile",
    "RemoteFolder",
    "RemoteRange",
    "ServerFolder",
    "SharedReads",
    "has_weights",
    "hub_cache",
    "is_small",
    "listing_commit",
    "missing_packages",
    "open_remote",
    "parse_model_uri",
    "place_in_hub_cache",
    "place_of_state",
    "pull_small_files",
    "remote_digest",
    "same_files_here",
    "state_of",
    "stream_remote",
]
