"""The errors of the model cache; the root is `mxserver.wire.errors.MxError`.

::

    MxError
    └── ModelError                 MX_MODEL
        ├── BadModelName           MX_MODEL_NAME            not a name that the provider can have
        ├── UnsafePath             MX_MODEL_PATH            a file name that leads out of the model's folder
        ├── ModelNotCached         MX_MODEL_NOT_CACHED      not here, or not all of what was asked for
        ├── RevisionNotFound       MX_REVISION_NOT_FOUND    the provider does not know it
        ├── SourceNotAllowed       MX_SOURCE_NOT_ALLOWED    the server may not download from there
        ├── ModelInUse             MX_MODEL_IN_USE          being read, downloaded or pinned
        ├── CacheFull              MX_CACHE_FULL            no room within the limits, or on the disk
        ├── DownloadsFull          MX_DOWNLOADS_FULL        too many downloads wait already
        ├── LeaseLost              MX_LEASE_LOST            another replica has taken the download over
        ├── CacheUnusable          MX_CACHE_UNUSABLE        the folder cannot be made or written
        └── DownloadFailed         MX_DOWNLOAD_FAILED       the provider refuses; retrying now does not help
            └── DownloadInterrupted MX_DOWNLOAD_INTERRUPTED  a retry may help
"""

from __future__ import annotations

from mxserver.wire import MxError


class ModelError(MxError):
    """Something about a model in the server's cache."""

    code = "MX_MODEL"


class BadModelName(ModelError):
    """An invalid name, provider or revision; the message says which rule it breaks."""

    code = "MX_MODEL_NAME"


class UnsafePath(ModelError):
    """A file name that is absolute, leads out of its folder, or is not portable; or a link that leads out of it."""

    code = "MX_MODEL_PATH"


class ModelNotCached(ModelError):
    """The cache has no such model, revision or file."""

    code = "MX_MODEL_NOT_CACHED"


class RevisionNotFound(ModelError):
    """The provider does not know the model or the revision."""

    code = "MX_REVISION_NOT_FOUND"


class SourceNotAllowed(ModelError):
    """The server does not download from there for anybody; the message names the setting."""

    code = "MX_SOURCE_NOT_ALLOWED"


class ModelInUse(ModelError):
    """Cannot be removed now: it is being read, downloaded, or it is pinned."""

    code = "MX_MODEL_IN_USE"


class CacheFull(ModelError):
    """No room within the cache's limits or on the disk, even after everything unused was evicted."""

    code = "MX_CACHE_FULL"


class DownloadsFull(ModelError):
    """As many downloads run and wait as may; asking again later helps."""

    code = "MX_DOWNLOADS_FULL"


class LeaseLost(ModelError):
    """Another replica has taken over this one's work, so this one must not publish anything any more."""

    code = "MX_LEASE_LOST"


class CacheUnusable(ModelError):
    """The cache folder cannot be made or written."""

    code = "MX_CACHE_UNUSABLE"


class DownloadFailed(ModelError):
    """The provider does not deliver the model."""

    code = "MX_DOWNLOAD_FAILED"


class DownloadInterrupted(DownloadFailed):
    """A download was interrupted; a retry may help. `retry_after_seconds`: the wait that the provider asks for."""

    code = "MX_DOWNLOAD_INTERRUPTED"

    def __init__(self, message: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
