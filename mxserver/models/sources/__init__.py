"""Where the server downloads models from: the hub, object stores, folders."""

from __future__ import annotations

from mxserver.models.sources.allowed import AllowedSources
from mxserver.models.sources.folder_download import FolderSource
from mxserver.models.sources.hub_download import HubSource
from mxserver.models.sources.object_download import ObjectSource
from mxserver.models.sources.source import ModelSource, RemoteFile, RemoteModel, is_disk_full

__all__ = [
    "AllowedSources",
    "FolderSource",
    "HubSource",
    "ModelSource",
    "ObjectSource",
    "RemoteFile",
    "RemoteModel",
    "is_disk_full",
]
