"""Model files below a prefix of S3, Google Cloud Storage or Azure: listed by obstore, read by Run:ai's streamer.

The streamer takes ranges and the addresses that they go to, so bytes land where they are wanted without another copy.
Both libraries read the usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, …) by themselves in this
process; credentials pass through nothing of ours, and what goes into messages is cleaned of them (`store_errors`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from mxcore.errors import ObjectMissing, ObjectStoreError, ObjectTruncated, StoreTimeout, StreamerMissing
from mxcore.storage.model_uri import ModelUri, missing_packages
from mxcore.storage.remote import RemoteFile, RemoteRange
from mxcore.storage.store_errors import as_store_error

__all__ = ["ObjectFolder"]

PIECE_BYTES = 4 * 1024 * 1024  # of one request: what a failure costs again, and what runs side by side
ATTEMPTS = 4
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0
_SILENCE_SECONDS = 120.0  # no answer of the streamer for so long: it is given up
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_GOOGLE_ACCOUNTS = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")


class ObjectFolder:
    """All objects below a prefix, as they were listed when this was made. Thread-safe; `close` must be called.

    Raises ObjectStoreError and its kin: StreamerMissing, ObjectMissing, ObjectDenied, WrongRegion, StoreUnreachable,
    StoreTimeout.
    """

    def __init__(self, uri: ModelUri) -> None:
        if missing := missing_packages(uri):
            raise StreamerMissing(f"{uri.text}: {missing}", file=uri.text)
        self.uri = uri
        self.name = uri.text
        self.bytes_read = 0
        self.retried_bytes = 0
        self._lock = threading.Lock()
        self._streamer: Any = None
        self._store = _store(uri)
        self.files = self._listed()
        if not self.files:
            raise ObjectMissing(f"{uri.text}: bucket {uri.bucket!r} has nothing below {uri.prefix!r}", file=uri.text)
        self._sizes = {file.path: file.size_bytes for file in self.files}

    def _key(self, path: str) -> str:
        return f"{self.uri.prefix}/{path}" if self.uri.prefix else path

    def _listed(self) -> tuple[RemoteFile, ...]:
        import obstore

        prefix = f"{self.uri.prefix}/" if self.uri.prefix else ""
        with self._errors("listing", self.uri.prefix):
            found = [item for batch in obstore.list(self._store, self.uri.prefix or None) for item in batch]
        files = [
            RemoteFile(item["path"].removeprefix(prefix), item["size"], item["e_tag"] or "")
            for item in found
            if not (item["size"] == 0 and item["path"].endswith("/"))
        ]
        return tuple(sorted(files))

    def whole(self, path: str) -> bytes:
        """A small object."""
        import obstore

        with self._errors("reading", self._key(path)):
            data = bytes(obstore.get(self._store, self._key(path)).bytes())
        if len(data) != self._sizes.get(path, len(data)):
            raise ObjectTruncated(self._sizes_differ(path, len(data)), file=self._key(path))
        return data

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """All ranges, in pieces side by side; pieces that failed are asked for again, if that can help.

        Raises as the constructor, and ObjectTruncated.
        """
        import tenacity

        left = list(_pieces(ranges))
        retries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS),
            retry=tenacity.retry_if_exception_type(StoreTimeout),
            reraise=True,
        )
        for attempt in retries:
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self.retried_bytes += sum(piece.length for piece in left)
                failed = self._submit(left)
                left = [piece for piece, _ in failed]
                if failed:
                    raise self._cause(*failed[0])

    def _submit(self, pieces: Sequence[RemoteRange]) -> list[tuple[RemoteRange, str]]:
        """The pieces that failed, with what the streamer says. One submission at a time."""
        from runai_model_streamer.libstreamer import libstreamer

        by_path: dict[str, list[RemoteRange]] = {}
        for piece in pieces:
            by_path.setdefault(piece.path, []).append(piece)
        groups = list(by_path.values())
        flat = [piece for group in groups for piece in group]
        failed: list[tuple[RemoteRange, str]] = []
        with self._lock:
            if self._streamer is None:
                self._streamer = _started(self.uri)
            base = f"{self.uri.scheme}://{self.uri.bucket}/"
            try:
                libstreamer.runai_request(
                    self._streamer,
                    [base + self._key(path) for path in by_path],
                    [len(group) for group in groups],
                    [piece.offset for piece in flat],
                    [piece.length for piece in flat],
                    [piece.address for piece in flat],
                )
                for _ in flat:
                    answer = libstreamer.runai_response(self._streamer, round(_SILENCE_SECONDS * 1000))
                    if answer is None:
                        raise StoreTimeout(f"{self.name}: the streamer ended", file=self.name)
                    code, _, file, place, _ = answer
                    piece = groups[file][place]
                    if code:
                        said = libstreamer.runai_response_str(code)
                        failed.append((piece, said.decode() if isinstance(said, bytes) else str(said)))
                    else:
                        self.bytes_read += piece.length
            except (ValueError, TimeoutError) as error:
                self._end()  # returns when nothing arrives in memory any more
                raise StoreTimeout(f"{self.name}: {error}", file=self.name) from error
            except BaseException:
                self._end()
                raise
        return failed

    def _cause(self, piece: RemoteRange, said: str) -> ObjectStoreError:
        """Why a piece failed: the streamer says little, so the store is asked about the object."""
        import obstore

        key = self._key(piece.path)
        try:
            with self._errors("reading", key):
                now = obstore.head(self._store, key)
        except ObjectStoreError as error:
            return error
        if now["size"] != self._sizes[piece.path]:
            return ObjectTruncated(self._sizes_differ(piece.path, now["size"]), file=key)
        return StoreTimeout(
            f"{self.uri.scheme} bucket {self.uri.bucket!r}, key {key!r}: {piece.length} bytes from {piece.offset} "
            f"did not come, although the object is there ({said}): slow, overloaded, or cut off",
            file=key,
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

    def _end(self) -> None:
        from runai_model_streamer.libstreamer import libstreamer

        streamer, self._streamer = self._streamer, None
        if streamer is not None:
            libstreamer.runai_end(streamer)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._end()


def _pieces(ranges: Sequence[RemoteRange]) -> Iterator[RemoteRange]:
    for path, offset, length, address in ranges:
        for begin in range(0, length, PIECE_BYTES):
            yield RemoteRange(path, offset + begin, min(PIECE_BYTES, length - begin), address + begin)


def _store(uri: ModelUri) -> Any:
    from obstore import store as stores

    # Plain HTTP is refused unless whoever runs the worker names such an endpoint for this kind of store.
    plain = any(url.startswith("http://") for url in _endpoints(uri.scheme))
    options: Any = {"retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}}
    if uri.scheme == "gs" and (url := next(_google_urls(), "")):
        options["base_url"] = url
        if os.environ.get("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS"):
            options["skip_signature"] = True
    options["client_options"] = {"allow_http": plain, "connect_timeout": "10s", "timeout": "60s"}
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


def _started(uri: ModelUri) -> Any:
    """The streamer, with defaults for what it reads from the environment when it begins. Never overrides one."""
    from runai_model_streamer.libstreamer import libstreamer

    if uri.scheme == "s3":
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true" if os.environ.get("AWS_ENDPOINT_URL") else "false")
        if os.environ.get("AWS_ENDPOINT_URL"):
            os.environ.setdefault("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")  # what other S3 servers understand
        if not os.environ.get("AWS_DEFAULT_REGION") and os.environ.get("AWS_REGION"):
            os.environ["AWS_DEFAULT_REGION"] = os.environ["AWS_REGION"]
    return libstreamer.runai_start()
