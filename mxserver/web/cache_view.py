"""The model cache for the status page and scrapes; opens nothing and writes nothing."""

from __future__ import annotations

import threading
import time
from typing import Any

from mxserver.models import ModelRecord, OpenCache
from mxserver.models.cache import ModelCache
from mxserver.telemetry import CacheObservation, bounded
from mxserver.wire.proto import model_pb2

LONGEST_MESSAGE = 200

# The cache's size is computed from the disk: not more often than this.
LOOK_SECONDS = 5.0
LISTED_MODELS = 20


class CacheView:
    """Downloads that run, and what is there. Thread-safe."""

    def __init__(self, cache: OpenCache) -> None:
        self._cache = cache
        self._looking = threading.Lock()
        self._taken_at = float("-inf")
        self._room: tuple[int, int, int, int] | None = None  # used bytes, limit, free bytes, models
        self._cached: list[dict[str, Any]] = []

    def downloads(self) -> list[dict[str, Any]]:
        """The downloads that run, as plain data."""
        opened = self._cache.peek()
        if opened is None:
            return []
        shown = []
        for job in opened[1].jobs():
            state = job.state()
            shown.append(
                {
                    "model_name": job.model.name,
                    "provider": model_pb2.ModelProvider.Name(job.model.provider).lower(),
                    "revision": state.revision or job.revision,
                    "phase": state.phase,
                    "message": bounded(state.message, LONGEST_MESSAGE),
                    "bytes_done": state.progress.bytes_done,
                    "bytes_total": state.progress.bytes_total,
                    "files_done": state.progress.files_done,
                    "files_total": state.progress.files_total,
                }
            )
        return shown

    def observation(self) -> CacheObservation | None:
        """For a scrape; None while the cache has not been used, or cannot be."""
        opened = self._cache.peek()
        with self._looking:
            if opened is not None and time.monotonic() - self._taken_at > LOOK_SECONDS:
                cache = opened[0]
                try:
                    room, records = cache.room(), cache.records()
                    self._room = (room.used_bytes, cache.limits.max_bytes, room.free_bytes, len(records))
                    self._cached = _listed(cache, records)
                except OSError:
                    self._room = None  # the cache's own keeper says why
                self._taken_at = time.monotonic()
            if opened is None or self._room is None:
                return None
            return CacheObservation(opened[1].running(), *self._room)

    def as_json(self) -> dict[str, Any] | None:
        """What is there, as plain data: sums, and the models that were used last."""
        seen = self.observation()
        return None if seen is None else {**seen._asdict(), "cached": self._cached}


def _listed(cache: ModelCache, records: list[ModelRecord]) -> list[dict[str, Any]]:
    used = {record.key: cache.last_used(record.key) for record in records}
    newest = sorted(records, key=lambda record: -used[record.key])[:LISTED_MODELS]
    return [
        {
            "model_name": record.key.model.name,
            "provider": record.key.model.provider_name,
            "revision": record.key.revision,
            "bytes": record.size_bytes,
            "used_ms": round(1000 * used[record.key]),
            "pinned": cache.is_pinned(record.key),
        }
        for record in newest
    ]
