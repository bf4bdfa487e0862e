"""Records in Redis, for several replicas of the server."""

from __future__ import annotations

from mxserver.store.redis.locks import RedisLocks
from mxserver.store.redis.store import RedisStore

__all__ = ["RedisLocks", "RedisStore"]
