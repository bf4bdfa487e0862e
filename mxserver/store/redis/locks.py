"""Locks that servers on several machines share: redis-py's own, by name and token. Each ends unless it is extended."""

from __future__ import annotations

import threading

from mxserver.store.errors import StoreUnavailable
from mxserver.store.redis.redis_link import Lock, LockError, RedisLink

PREFIX = "mx:lock:"


class RedisLocks:
    """What mxserver.models.cache.lease.SharedLocks asks for. Thread-safe. Connects at first use."""

    def __init__(self, url: str, prefix: str = PREFIX) -> None:
        """Raises SettingError for an invalid URL."""
        self._link = RedisLink(url)
        self._prefix = prefix
        self._lock = threading.Lock()
        self._ours: dict[tuple[str, str], Lock] = {}

    def acquire(self, name: str, token: str, seconds: float) -> bool:
        lock = self._link.lock(self._prefix + name, seconds)
        try:
            is_ours = self._link.answer(lambda: lock.acquire(blocking=False, token=token))
        except StoreUnavailable:
            return False
        if is_ours:
            with self._lock:
                self._ours[name, token] = lock
        return bool(is_ours)

    def extend(self, name: str, token: str, seconds: float) -> bool | None:
        with self._lock:
            lock = self._ours.get((name, token))
        if lock is None:
            return False

        def reacquire() -> bool:
            try:
                return bool(lock.reacquire())
            except LockError:  # it has ended, or is another's
                return False

        try:
            return self._link.answer(reacquire)
        except StoreUnavailable:
            return None

    def release(self, name: str, token: str) -> None:
        with self._lock:
            lock = self._ours.pop((name, token), None)
        if lock is None:
            return

        def release() -> None:
            try:
                lock.release()
            except LockError:
                return

        try:
            self._link.answer(release)
        except StoreUnavailable:
            return  # it ends by itself

    def is_held(self, name: str) -> bool:
        try:
            return self._link.answer(lambda: self._link.has(self._prefix + name))
        except StoreUnavailable:
            return True

    def close(self) -> None:
        self._link.close()
