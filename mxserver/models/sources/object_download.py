"""Models below a prefix of S3, Google Cloud Storage or Azure Blob Storage, by `obstore` (Rust's object_store).

Credentials and endpoints come from that library's environment names (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME …), web identity tokens and the machine's metadata service.
The revision of a prefix is a hash of its listing, so that changed objects are another revision.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from mxserver.models.errors import DownloadFailed, DownloadInterrupted, RevisionNotFound
from mxserver.models.names import ModelKey, ModelName
from mxserver.models.sources.source import RemoteFile, RemoteModel, is_disk_full, write_all
from mxserver.wire import install_command
from mxserver.wire.proto import model_pb2
from mxserver.wire.stores import cause_of, listed_objects

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

PART_BYTES = 16 * 1024 * 1024
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


class ObjectSource:
    """All three providers: they differ in how a store is opened."""

    parallel_files = 8

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        try:
            store, prefix = _open(model)
            found = listed_objects(store, prefix)
        except Exception as error:
            raise _as_model_error(model, prefix_of(model), error) from error
        files = [RemoteFile(item.path, item.size_bytes, etag=item.etag) for item in found]
        if not files:
            raise RevisionNotFound(f"{model.name} has no objects")
        return RemoteModel.of(ModelKey(model, listing_revision(files)), files)

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: Event) -> Path:

        import obstore.exceptions as errors

        model = remote.key.model
        beside = scratch / hashlib.sha256(file.path.encode()).hexdigest()
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            store, prefix = _open(model)
            path = f"{prefix}/{file.path}" if prefix else file.path
            try:
                self._in_parts(store, path, file, handle, stopping)
            except errors.GenericError as error:
                if "non-partial" not in str(error):
                    raise
                self._in_one(store, path, file, handle, stopping)  # a store may ignore ranges (RFC 9110, 14.2)
        except DownloadFailed:
            raise
        except Exception as error:
            raise _as_model_error(model, f"{prefix_of(model)}/{file.path}".removeprefix("/"), error) from error
        finally:
            os.close(handle)
        return beside

    def _in_parts(self, store: Any, path: str, file: RemoteFile, handle: int, stopping: Event) -> None:
        """Short requests, each with the library's retries and time-out."""
        import obstore

        size = file.size or 0
        for start in range(0, size, PART_BYTES):
            end = min(start + PART_BYTES, size)
            options = _unchanged(file) | ({} if end - start == size else {"range": (start, end)})
            part = memoryview(obstore.get(store, path, options=options).bytes())
            if len(part) != end - start:
                raise DownloadInterrupted(
                    f"{path} at {start}: {len(part)} bytes were received instead of {end - start}"
                )
            _check_running(path, stopping)
            write_all(handle, part, start)

    def _in_one(self, store: Any, path: str, file: RemoteFile, handle: int, stopping: Event) -> None:
        import obstore

        offset = 0
        for part in obstore.get(store, path, options=_unchanged(file)).stream(min_chunk_size=PART_BYTES):
            _check_running(path, stopping)
            write_all(handle, memoryview(part), offset)
            offset += len(part)


def _unchanged(file: RemoteFile) -> Any:
    """Options of a request for the object that was listed, and no later one."""
    return {"if_match": file.etag} if file.etag else {}


def _check_running(path: str, stopping: Event) -> None:
    if stopping.is_set():
        raise DownloadFailed(f"{path} was interrupted: the server is stopping")


def listing_revision(files: list[RemoteFile]) -> str:
    """A revision for the present content of a prefix: 40 hex digits."""
    listing = "\n".join(f"{file.path}\t{file.size}\t{file.etag}" for file in sorted(files, key=lambda f: f.path))
    return hashlib.sha256(listing.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def prefix_of(model: ModelName) -> str:
    """The prefix below which its objects are; "" is the whole bucket."""
    return model.name.partition("://")[2].partition("/")[2]


def _open(model: ModelName) -> tuple[S3Store | GCSStore | AzureStore, str]:
    """The bucket's store, and the prefix in it."""
    try:
        from obstore import store as stores
    except ImportError as error:
        extra = {model_pb2.S3: "s3", model_pb2.GCS: "gcs", model_pb2.AZURE: "azure"}[model.provider]
        raise DownloadFailed(
            f"{model.name} needs obstore ({error}); install it with: {install_command(extra)}"
        ) from error
    bucket, prefix = model.name.partition("://")[2].partition("/")[0], prefix_of(model)
    # Plain HTTP is refused unless the server's environment names such an endpoint.
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    options: Any = {"client_options": {"allow_http": True}} if plain else {}
    if model.provider == model_pb2.S3:
        return stores.S3Store(bucket, **options), prefix
    if model.provider == model_pb2.GCS:
        return stores.GCSStore(bucket, **options), prefix
    container, _, account = bucket.partition("@")
    if account:
        options["account_name"] = account.partition(".")[0]
    return stores.AzureStore(container, **options), prefix


def _as_model_error(model: ModelName, key: str, error: Exception) -> DownloadFailed | RevisionNotFound:
    """Our error for one of the library's. Programming errors pass unchanged.

    The library has already retried what can be retried within a request.
    """
    import obstore.exceptions as errors

    if isinstance(error, DownloadFailed):
        return error
    if isinstance(error, OSError) and is_disk_full(error):
        return DownloadInterrupted(f"{model.name}: no space left on the disk")
    if not isinstance(error, (errors.BaseError, OSError)):
        raise error
    cause = cause_of(error, model.name.partition("://")[0])
    text = f"{model.name}, key {key!r}: {cause}"
    if cause.kind == "missing":
        return RevisionNotFound(text)
    if cause.kind == "replaced":
        return DownloadFailed(f"{text}; ask again for the new state")
    return DownloadInterrupted(text) if cause.may_pass else DownloadFailed(text)
