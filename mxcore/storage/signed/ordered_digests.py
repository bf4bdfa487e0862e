"""Digests of files whose bytes come in order, a piece after the other, made on a thread of their own."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from mxcore.errors import SignedFileMismatch
from mxcore.storage.signed.manifest import Hasher, SignedManifest, hasher_of

__all__ = ["FileDigest", "HashThread"]


class FileDigest:
    """One file against its promises. `at` is the number of bytes that it has seen. One thread at a time."""

    def __init__(self, manifest: SignedManifest, name: str, place: str) -> None:
        """`place` is what messages call the folder."""
        self._what = f"{place}/{name}"
        self._signature = manifest.signature
        self._promises = list(reversed(manifest.files[name]))
        self._hasher: Hasher | None = None
        self.at = 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes. Raises SignedFileMismatch at the end of a shard that is not what was signed."""
        while data:
            if not self._promises:
                raise self._mismatch(f"is longer than the {self.at} bytes that were signed")
            promise = self._promises[-1]
            if self._hasher is None:
                self._hasher = hasher_of(promise.algorithm, self._signature)()
            count = len(data) if promise.end is None else min(len(data), promise.end - self.at)
            self._hasher.update(data[:count])
            self.at += count
            data = data[count:]
            if self.at == promise.end:
                self._compare()

    def finish(self) -> None:
        """All bytes have been seen. Raises SignedFileMismatch."""
        if self._promises and self._promises[-1].end is None:
            if self._hasher is None:
                self._hasher = hasher_of(self._promises[-1].algorithm, self._signature)()
            self._compare()
        if self._promises:
            raise self._mismatch(f"ends after {self.at} bytes, more were signed")

    def _compare(self) -> None:
        promise, hasher = self._promises.pop(), self._hasher
        self._hasher = None
        found = hasher.hexdigest() if hasher is not None else ""
        if found != promise.digest:
            part = "" if promise.end is None else f"(bytes {promise.begin} to {promise.end}) "
            raise self._mismatch(f"{part}is {promise.algorithm} {found}, signed was {promise.digest}")

    def _mismatch(self, how: str) -> SignedFileMismatch:
        return SignedFileMismatch(
            f"{self._what} {how} ({self._signature}): nothing of it is used. Restore the file, or take the signature "
            "of this version of the model"
        )


class HashThread:
    """Updates digests in the order of the calls, while others read on. End it with `close`. One caller at a time.

    `seconds` are those that it hashed, `waited_seconds` those that its callers waited for it, `bytes` what it hashed.
    """

    def __init__(self) -> None:
        self.seconds = self.waited_seconds = 0.0
        self.bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mx-signed")
        self._under_way: list[Future[None]] = []

    def submit(self, digest: FileDigest, address: int, count: int) -> None:
        """Memory that stays as it is until `wait`."""
        self._under_way.append(self._thread.submit(self._update, digest, address, count))

    def wait(self) -> None:
        """Until nobody reads that memory any more. Raises SignedFileMismatch."""
        began = time.perf_counter()
        under_way, self._under_way = self._under_way, []
        wait(under_way)
        self.waited_seconds += time.perf_counter() - began
        for future in under_way:
            future.result()

    def close(self) -> None:
        """Waits for what is under way, for its memory may go afterwards. Idempotent."""
        self._thread.shutdown(wait=True)

    def _update(self, digest: FileDigest, address: int, count: int) -> None:
        began = time.perf_counter()
        digest.update(memoryview((ctypes.c_char * count).from_address(address)).cast("B"))
        self.seconds += time.perf_counter() - began
        self.bytes += count
