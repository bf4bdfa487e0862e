"""Model files below a prefix of S3, Google Cloud Storage or Azure, by obstore or by Run:ai's model streamer.

Both libraries read the usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, …) by themselves in this
process; credentials pass through nothing of ours, and what goes into messages is cleaned of them (`store_errors`).
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mxcore.errors import ObjectMissing, ObjectStoreError, ObjectTruncated, StoreTimeout, StreamerMissing
from mxcore.storage.remote.model_streamer import ModelStreamer
from mxcore.storage.remote.model_uri import ModelUri, missing_packages
from mxcore.storage.remote.ranged_gets import RangedGets
from mxcore.storage.remote.remote_folder import RemoteFile, RemoteRange
from mxcore.storage.remote.store_errors import RangesIgnored, as_store_error
from mxserver.wire.stores import listed_objects

__all__ = ["ObjectFolder", "ObjectOptions", "Reader"]

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_GOOGLE_ACCOUNTS = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")

_log = logging.getLogger(__name__)

Reader = Literal["auto", "obstore", "runai"]


class ObjectOptions(NamedTuple):
    """How a store is read; the defaults do for every store that was tried.

    `reader`: "obstore", "runai" (Run:ai's model streamer), or "auto": obstore, and the streamer for a store that does
    not answer ranges as HTTP says. `timeout_seconds` without a byte end a request, which is then begun again.
    """

    reader: Reader = "auto"
    connections: int = 16
    timeout_seconds: float = 30.0


_DEFAULTS = ObjectOptions()


class _RangeReader(Protocol):
    bytes_read: int
    resumed: int

    def read(self, ranges: Sequence[RemoteRange]) -> None: ...

    def close(self) -> None: ...


class ObjectFolder:
    """All objects below a prefix, as they were listed when this was made. Thread-safe; `close` must be called.

    Raises ObjectStoreError and its kin: StreamerMissing, ObjectMissing, ObjectDenied, ObjectCredentials, WrongRegion,
    StoreUnreachable, StoreTimeout.
    """

    def __init__(self, uri: ModelUri, options: ObjectOptions = _DEFAULTS) -> None:
        if missing := missing_packages(uri, streamer=options.reader == "runai"):
            raise StreamerMissing(f"{uri.text}: {missing}", file=uri.text)
        self.uri = uri
        self.name = uri.text
        self._options = options
        self._lock = threading.Lock()
        self._store = _store(uri, options.timeout_seconds)
        self._versions: dict[str, str] = {}  # the ETag of an object's first answer
        self.files = self._listed()
        if not self.files:
            raise ObjectMissing(f"{uri.text}: bucket {uri.bucket!r} has nothing below {uri.prefix!r}", file=uri.text)
        self._sizes = {file.path: file.size_bytes for file in self.files}
        self._readers: list[_RangeReader] = [
            self._streamer() if options.reader == "runai" else RangedGets(self._opened, self._why, options.connections)
        ]

    @property
    def bytes_read(self) -> int:
        """Of ranges, over all readers."""
        return sum(reader.bytes_read for reader in self._readers)

    @property
    def resumed(self) -> int:
        """How often requests that failed were asked for again."""
        return sum(reader.resumed for reader in self._readers)

    def _streamer(self) -> ModelStreamer:
        return ModelStreamer(self.uri, self._key, self._cause, self._options.timeout_seconds)

    def _key(self, path: str) -> str:
        return f"{self.uri.prefix}/{path}" if self.uri.prefix else path

    def _listed(self) -> tuple[RemoteFile, ...]:
        with self._errors("listing", self.uri.prefix):
            return tuple(RemoteFile(*found) for found in listed_objects(self._store, self.uri.prefix))

    def whole(self, path: str) -> bytes:
        """A small object."""
        try:
            data = bytes(self._opened(path).bytes())
        except Exception as error:  # noqa: BLE001 - becomes one of ours
            raise self._why(error, path) from None
        if len(data) != self._sizes.get(path, len(data)):
            raise ObjectTruncated(self._sizes_differ(path, len(data)), file=self._key(path))
        return data

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """All ranges, in pieces side by side; what failed is asked for again, if that can help.

        Raises as the constructor, and ObjectTruncated.
        """
        reader = self._readers[-1]
        try:
            reader.read(ranges)
        except RangesIgnored as error:
            self._change_reader(reader, error)
            self._readers[-1].read(ranges)

    def _change_reader(self, reader: _RangeReader, error: RangesIgnored) -> None:
        """To Run:ai's streamer, which does not look at an answer's status; raises where that may not or cannot be."""
        with self._lock:
            if self._readers[-1] is not reader:
                return
            if self._options.reader != "auto":
                raise error
            if missing := missing_packages(self.uri, streamer=True):
                raise StreamerMissing(f"{error}; Run:ai's streamer could read it: {missing}", file=self.name) from error
            _log.warning("%s; Run:ai's model streamer reads on", error)
            self._readers.append(self._streamer())

    def _opened(self, path: str, begin: int = 0, end: int | None = None) -> Any:
        """obstore's answer to a GET. Raises ObjectTruncated when the object is not the one of earlier answers."""
        import obstore

        options: Any = {} if end is None else {"range": (begin, end)}
        version = self._versions.get(path, "")
        if version and not version.startswith("W/"):
            options["if_match"] = version
        answer = obstore.get(self._store, self._key(path), options=options)
        found = answer.meta
        if found["size"] != self._sizes.get(path, found["size"]):
            raise ObjectTruncated(self._sizes_differ(path, found["size"]), file=self._key(path))
        if found["e_tag"] and self._versions.setdefault(path, found["e_tag"]) != found["e_tag"]:
            raise ObjectTruncated(self._replaced(path), file=self._key(path))
        return answer

    def _why(self, error: Exception, path: str) -> ObjectStoreError:
        """Our error for one of a GET; where the library's says little, the store is asked about the object."""
        if isinstance(error, ObjectStoreError):
            return error
        told = as_store_error(error, self.uri, self._key(path), "reading")
        if type(told) is not ObjectStoreError or path not in self._sizes:
            return told
        return self._state_of(path) or told

    def _state_of(self, path: str) -> ObjectStoreError | None:
        """What is wrong with the object itself; None when it is as it was."""
        import obstore

        key = self._key(path)
        try:
            with self._errors("reading", key):
                now = obstore.head(self._store, key)
        except ObjectStoreError as error:
            return error
        if now["size"] != self._sizes[path]:
            return ObjectTruncated(self._sizes_differ(path, now["size"]), file=key)
        if now["e_tag"] and self._versions.get(path, now["e_tag"]) != now["e_tag"]:
            return ObjectTruncated(self._replaced(path), file=key)
        return None

    def _replaced(self, path: str) -> str:
        return (
            f"{self.uri.scheme} bucket {self.uri.bucket!r}, key {self._key(path)!r} was replaced while it was read: "
            "its ETag is another one now"
        )

    def _cause(self, piece: RemoteRange, said: str) -> ObjectStoreError:
        """Why a piece failed of which the streamer says little."""
        return self._state_of(piece.path) or StoreTimeout(
            f"{self.uri.scheme} bucket {self.uri.bucket!r}, key {self._key(piece.path)!r}: {piece.length} bytes from "
            f"{piece.offset} did not come, although the object is there ({said}): slow, overloaded, or cut off",
            file=self._key(piece.path),
            offset=piece.offset,
            wanted=piece.length,
        )

    def _sizes_differ(self, path: str, size_bytes: int) -> str:
        return (
            f"{self.uri.scheme} bucket {self.uri.bucket!r}, key {self._key(path)!r} has {size_bytes} bytes now; the "
            f"listing said {self._sizes[path]}: it was truncated, or replaced while it was read"
        )

    def check_unchanged(self) -> None:
        """Raises ObjectTruncated when an object is another one than when this was made."""
        now = {file.path: file for file in self._listed()}
        for file in self.files:
            if file.path.endswith(".safetensors") and now.get(file.path) != file:
                found = now[file.path].size_bytes if file.path in now else 0
                raise ObjectTruncated(
                    f"{self.uri.scheme} bucket {self.uri.bucket!r}, key {self._key(file.path)!r} was replaced while it "
                    f"was read ({file.size_bytes} bytes then, {found} now)",
                    file=self._key(file.path),
                )

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - becomes one of ours
            raise as_store_error(error, self.uri, key, doing) from None  # the cause may repeat what was signed

    def close(self) -> None:
        """Idempotent."""
        for reader in self._readers:
            reader.close()


def _store(uri: ModelUri, timeout_seconds: float) -> Any:
    from obstore import store as stores

    # Plain HTTP is refused unless whoever runs the worker names such an endpoint for this kind of store.
    plain = any(url.startswith("http://") for url in _endpoints(uri.scheme))
    options: Any = {"retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}}
    if uri.scheme == "gs" and (url := next(_google_urls(), "")):
        options["base_url"] = url
        if os.environ.get("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS"):
            options["skip_signature"] = True
    silence = timedelta(seconds=timeout_seconds)
    options["client_options"] = {
        "allow_http": plain,
        "connect_timeout": min(silence, timedelta(seconds=10)),
        "read_timeout": silence,
        "timeout": timedelta(hours=1),  # of a whole GET: a slow one is none that has died
    }
    kinds: dict[str, Any] = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
    try:
        return kinds[uri.scheme](uri.bucket, **options)
    except Exception as error:  # noqa: BLE001 - becomes one of ours
        raise as_store_error(error, uri, uri.prefix, "opening") from None


def _google_urls() -> Iterator[str]:
    yield from filter(None, map(os.environ.get, _ENDPOINTS["gs"]))


def _endpoints(scheme: str) -> Iterator[str]:
    """The endpoints that the environment names for a kind of store."""
    if scheme != "gs":
        yield from filter(None, map(os.environ.get, _ENDPOINTS[scheme]))
        return
    yield from _google_urls()
    accounts = [
        Path(path).read_text() for path in filter(None, map(os.environ.get, _GOOGLE_ACCOUNTS)) if Path(path).is_file()
    ]
    for text in (*accounts, os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", "")):
        with suppress(ValueError, AttributeError):
            yield str(json.loads(text).get("gcs_base_url", ""))
