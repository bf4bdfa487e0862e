"""Values of many MiB, written to Redis and read in parts: while it takes or gives a value, it answers nobody else.

The parts are one hash. Until a script names it in a record, it ends by itself, so that a writer that dies leaves
nothing for long.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mxserver.store.errors import StoreUnavailable
from mxserver.store.redis.redis_link import RedisLink

PART_BYTES = 1024 * 1024
WRITE_SECONDS = 20.0  # for a whole value; below the 30 s that clients wait
KEEP_SECONDS = 60.0  # from a value's last part until a record has to name it


class Written(NamedTuple):
    """A value whose parts are all there."""

    token: str = ""
    parts: int = 0
    bytes: int = 0


WHOLE = Written()
"""Of a value that has no parts."""


class LargeValues:
    """The values in parts below one prefix. Thread-safe."""

    def __init__(self, link: RedisLink, prefix: str) -> None:
        self._link = link
        self._prefix = f"{prefix}parts:"

    @contextmanager
    def written(self, value: bytes) -> Iterator[Written]:
        """Writes a value, for a script that names it. If that raises, the parts are removed.

        Raises:
            StoreUnavailable: Redis does not work, or takes too long.
        """
        token = secrets.token_hex(16)
        try:
            parts = self._write(token, value)
            yield Written(token, parts, len(value))
        except BaseException:
            with contextlib.suppress(StoreUnavailable):  # then they end by themselves
                self._link.drop(self._prefix + token)
            raise

    def _write(self, token: str, value: bytes) -> int:
        latest = time.monotonic() + WRITE_SECONDS
        whole = memoryview(value)
        starts = range(0, len(value), PART_BYTES)
        for number, start in enumerate(starts):
            if time.monotonic() > latest:
                raise StoreUnavailable(
                    f"Redis took {start} of {len(value)} bytes within {WRITE_SECONDS:g} s; nothing of them is kept"
                )
            self._link.put_part(self._prefix + token, number, bytes(whole[start : start + PART_BYTES]), KEEP_SECONDS)
        return len(starts)

    def read(self, token: str, size_bytes: int) -> bytes | None:
        """The value; None where it is gone, or not of this size. Raises StoreUnavailable."""
        value = io.BytesIO(bytes(size_bytes))  # it gives its bytes away without a copy
        for number in range(-(-size_bytes // PART_BYTES)):
            part = self._link.part(self._prefix + token, number)
            if part is None:
                return None
            value.write(part)
        return value.getvalue() if value.tell() == size_bytes else None
