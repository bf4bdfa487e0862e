"""The connection to Redis. It runs scripts, raises StoreUnavailable when they fail, and has a name for logs."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mxserver.store.errors import StoreUnavailable, StoreUnusable
from mxserver.wire import SettingError, install_command

try:
    import redis
    from redis.backoff import ConstantBackoff
    from redis.exceptions import LockError as LockError  # for `locks`: here what is missing is told
    from redis.lock import Lock as Lock
    from redis.retry import Retry
except ImportError as error:
    raise SettingError(
        f"the store redis needs the package redis, which cannot be imported ({error}); install it with "
        + install_command("redis")
    ) from error

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0  # below the 30 s that clients wait, so that they get the reason
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


def place_of(url: str) -> str:
    """The URL as it may be shown: without user, password and options."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


class RedisLink:
    """Runs scripts on one Redis over a pool of connections. Thread-safe.

    While Redis cannot be reached, one caller tries at a time, with growing pauses (50 ms to 1 s); the others fail at
    once with the reason, so that they do not pile up.
    """

    def __init__(self, url: str) -> None:
        """Raises SettingError for an invalid URL. Connects at the first script."""
        self.place = place_of(url)
        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                url,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=ANSWER_SECONDS,
                # One retry, for a pooled connection that Redis closed meanwhile. Scripts may be repeated, because
                # publishing twice within one life is harmless.
                retry=Retry(ConstantBackoff(0.01), 1),
                client_name="mxserver",
                **({} if url.startswith("unix:") else {"socket_keepalive": True}),
            )
        except ValueError as error:
            raise SettingError(f"the URL of Redis, {self.place}, is refused: {error}") from error
        self._scripts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._failures = 0
        self._try_at = 0.0

    def run(self, script: str, *arguments: str | bytes) -> Any:
        """What the script returns. Raises StoreUnavailable."""
        known = self._scripts.get(script)
        if known is None:
            known = self._scripts[script] = self._redis.register_script(script)
        return self.answer(lambda: known(args=arguments))

    def names(self, key: str, several: int) -> Iterator[list[bytes]]:
        """What is in a sorted set, about `several` at a time; what comes or goes meanwhile may be missing, and some may
        come twice. Raises StoreUnavailable.
        """
        cursor = 0
        while True:
            found: Any
            cursor, found = self.answer(lambda at=cursor: self._redis.zscan(key, at, count=several))  # type: ignore[misc]
            yield [name for name, _ in found]
            if not cursor:
                return

    def put_part(self, key: str, number: int, part: bytes, keep_seconds: float) -> None:
        """Writes a part of a large value, which ends by itself after this time. Raises StoreUnavailable."""
        several = self._redis.pipeline(transaction=False)
        several.hset(key, str(number), part)
        several.pexpire(key, round(keep_seconds * 1000))
        self.answer(several.execute)

    def part(self, key: str, number: int) -> bytes | None:
        """A part of a large value; None without it. Raises StoreUnavailable."""
        found: Any = self.answer(lambda: self._redis.hget(key, str(number)))
        return None if found is None else bytes(found)

    def drop(self, key: str) -> None:
        """Removes a value. Raises StoreUnavailable."""
        self.answer(lambda: self._redis.unlink(key))

    def lock(self, name: str, seconds: float) -> Lock:
        """A lock that ends after this time; its calls go through `answer`."""
        return Lock(self._redis, name, timeout=seconds, thread_local=False)

    def has(self, name: str) -> bool:
        """Whether there is such a key; through `answer`."""
        return bool(self._redis.exists(name))

    def answer(self, ask: Callable[[], T]) -> T:
        """What `ask` makes of Redis. Raises StoreUnavailable."""
        self._require_turn()
        try:
            answer = ask()
        except redis.RedisError as error:
            raise self._failed(error) from error
        if self._failure is not None:
            self._worked()
        return answer

    def is_lasting(self) -> bool:
        """Whether Redis writes changes to a file before it acknowledges them. True where Redis does not say."""
        try:
            settings = self._redis.config_get("appendonly", "appendfsync")
        except redis.RedisError:  # managed services do not allow the question
            return True
        return settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always"

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        self._redis.close()

    def _require_turn(self) -> None:
        if self._failure is None:
            return
        with self._lock:
            now = time.monotonic()
            if self._failure is not None and now < self._try_at:
                raise StoreUnavailable(self._failure)
            self._try_at = now + ANSWER_SECONDS  # this caller tries; the others wait for its result

    def _failed(self, error: redis.RedisError) -> StoreUnavailable:
        text = f"Redis at {self.place} does not work: {_reason(error)}"
        with self._lock:
            if self._failure is None:
                _LOG.warning("%s", text)
            self._failure = text
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self._failures)
            self._failures = min(self._failures + 1, 10)
            self._try_at = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return StoreUnavailable(text)

    def _worked(self) -> None:
        with self._lock:
            if self._failure is not None:
                _LOG.info("Redis at %s works again", self.place)
            self._failure = None
            self._failures = 0

    def require_usable(self) -> None:
        """Raises StoreUnusable when Redis cannot be reached, or refuses, so that the server fails at start."""
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise StoreUnusable(
                f"Redis at {self.place} cannot be used ({_reason(error)}); start it, or set REDIS_URL, or "
                "MX_REDIS_HOST and MX_REDIS_PORT, to where it is"
            ) from error


def _reason(error: redis.RedisError) -> str:
    """One line, without the script that failed."""
    return str(error).split("\n", 1)[0].split(" script: ", 1)[0] or type(error).__name__
