"""Ranges of objects by Run:ai's model streamer, which takes ranges and the addresses that they go to.

It reads the store's variables by itself. A request that breaks is begun anew: the streamer does not say how far it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mxcore.errors import ObjectStoreError, StoreTimeout
from mxcore.process import c_getenv, c_setenv
from mxcore.storage.remote.model_uri import ModelUri
from mxcore.storage.remote.remote_folder import RemoteRange

__all__ = ["ModelStreamer"]

PIECE_BYTES = 4 * 1024 * 1024  # of one request: what a failure costs again, and what runs side by side
ATTEMPTS = 4
SILENCE_SECONDS = 120.0  # it tries again by itself before it says anything
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0


class ModelStreamer:
    """Reads below a bucket. Thread-safe, one submission at a time; `close` must be called.

    `key_of(path)` is an object's key; `cause(piece, said)` makes an error of what the streamer said of a piece. A
    StoreTimeout is tried again three times.
    """

    def __init__(
        self,
        uri: ModelUri,
        key_of: Callable[[str], str],
        cause: Callable[[RemoteRange, str], ObjectStoreError],
        timeout_seconds: float,
    ) -> None:
        self._uri = uri
        self._key_of = key_of
        self._cause = cause
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._streamer: Any = None
        self.bytes_read = 0
        self.resumed = 0  # times that pieces were asked for again

    def read(self, ranges: Sequence[RemoteRange]) -> None:
        """Returns, or raises, when nothing arrives in that memory any more."""
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
                self.resumed += attempt.retry_state.attempt_number > 1
                failed = self._submit(left)
                left = [piece for piece, _ in failed]
                if failed:
                    raise self._cause(*failed[0])

    def _submit(self, pieces: Sequence[RemoteRange]) -> list[tuple[RemoteRange, str]]:
        """The pieces that failed, with what the streamer says."""
        from runai_model_streamer.libstreamer import libstreamer

        by_path: dict[str, list[RemoteRange]] = {}
        for piece in pieces:
            by_path.setdefault(piece.path, []).append(piece)
        groups = list(by_path.values())
        flat = [piece for group in groups for piece in group]
        failed: list[tuple[RemoteRange, str]] = []
        waiting = dict.fromkeys((file, place) for file, group in enumerate(groups) for place in range(len(group)))
        with self._lock:
            if self._streamer is None:
                self._streamer = _started(self._uri, self._timeout_seconds)
            base = f"{self._uri.scheme}://{self._uri.bucket}/"
            try:
                libstreamer.runai_request(
                    self._streamer,
                    [base + self._key_of(path) for path in by_path],
                    [len(group) for group in groups],
                    [piece.offset for piece in flat],
                    [piece.length for piece in flat],
                    [piece.address for piece in flat],
                )
                while waiting:
                    answer = libstreamer.runai_response(self._streamer, round(SILENCE_SECONDS * 1000))
                    if answer is None:
                        raise TimeoutError("the streamer ended")
                    code, _, file, place, _ = answer
                    piece = groups[file][place]
                    waiting.pop((file, place), None)
                    if code:
                        said = libstreamer.runai_response_str(code)
                        failed.append((piece, said.decode() if isinstance(said, bytes) else str(said)))
                    else:
                        self.bytes_read += piece.length
            except (ValueError, TimeoutError) as error:
                self._end()  # returns when nothing arrives in memory any more
                file, place = next(iter(waiting), (0, 0))
                raise self._cause(groups[file][place], str(error)) from error
            except BaseException:
                self._end()
                raise
        return failed

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


def _started(uri: ModelUri, timeout_seconds: float) -> Any:
    """The streamer, with defaults for what it reads from the environment when it begins. Never overrides one."""
    from runai_model_streamer.libstreamer import libstreamer

    if uri.scheme == "s3":
        endpoint, region = c_getenv("AWS_ENDPOINT_URL"), c_getenv("AWS_REGION")
        defaults = {
            "AWS_EC2_METADATA_DISABLED": "true" if endpoint else "false",
            # Its own: 1 s below some rate, which a busy store does not keep.
            "RUNAI_STREAMER_S3_REQUEST_TIMEOUT_MS": str(round(timeout_seconds * 1000)),
            "RUNAI_STREAMER_S3_LOW_SPEED_LIMIT": "1",
        }
        if endpoint:
            defaults["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"  # what other S3 servers understand
        if region:
            defaults["AWS_DEFAULT_REGION"] = region
        for name, value in defaults.items():
            if not c_getenv(name):
                c_setenv(name, value)
    return libstreamer.runai_start()
