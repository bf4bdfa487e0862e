"""The model cache of a running server: opened when it is first needed, kept within its limits, closed at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mxserver.models.cache import Limits, ModelCache, SharedLocks
from mxserver.models.downloads import DownloadJob, Downloads
from mxserver.models.errors import CacheFull, CacheUnusable, LeaseLost
from mxserver.models.sources import AllowedSources, FolderSource, HubSource, ModelSource, ObjectSource
from mxserver.models.transfer import RetryPolicy
from mxserver.wire import left_out
from mxserver.wire.files import Provider
from mxserver.wire.proto import model_pb2

_LOG = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0  # how long closing may wait for the folder's file system


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What the server's settings say about the model cache."""

    root: Path
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    lease_seconds: float = 30.0
    file_sources: tuple[Path, ...] = ()
    model_sources: tuple[str, ...] = ()  # empty: all
    retry: RetryPolicy = RetryPolicy()  # noqa: RUF009 - frozen
    ignore: tuple[str, ...] | None = None  # of `left_out`
    allow: tuple[str, ...] = ()
    shared_locks: SharedLocks | None = None  # of servers on several machines


class OpenCache:
    """Cache and downloads. The folder is not touched before `cache` or `downloads` is used. Thread-safe."""

    def __init__(
        self,
        settings: CacheSettings,
        show_state: Callable[[bool], None],
        download_ended: Callable[[DownloadJob], None] = lambda _: None,
    ) -> None:
        """`show_state` is called from a thread of this object with whether the folder can be used.

        `download_ended` is called with every ended download, from the download's thread.
        """
        self._download_ended = download_ended
        self.settings = settings
        self._show_state = show_state
        self._lock = threading.Lock()
        self._opened: tuple[ModelCache, Downloads, threading.Thread] | None = None
        self._closed = False

    @property
    def cache(self) -> ModelCache:
        """Raises CacheUnusable."""
        return self._open()[0]

    @property
    def downloads(self) -> Downloads:
        """Raises CacheUnusable."""
        return self._open()[1]

    def peek(self) -> tuple[ModelCache, Downloads] | None:
        """Cache and downloads where they are open; opens nothing."""
        with self._lock:
            return self._opened[:2] if self._opened else None

    def open(self) -> None:
        """Opens it now rather than at the first call. Raises CacheUnusable."""
        self._open()

    def stop_downloads(self) -> None:
        """Ends downloads, now or soon, and tells the callers that wait for them. Complete files are kept."""
        with self._lock:
            self._closed = True
            if self._opened:
                self._opened[0].stopping.set()

    def close(self) -> None:
        """Ends downloads and releases the folder. Idempotent. Does not wait for a file system that does not answer:
        leases in it end with this process, or by their time.
        """
        with self._lock:
            self._closed = True
            opened, self._opened = self._opened, None
        if opened is None:
            return
        cache, downloads, keeper = opened
        downloads.close()

        def let_go() -> None:
            keeper.join()
            cache.close()

        closing = threading.Thread(target=let_go, name="cache-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            _LOG.warning("the cache folder does not answer and is left as it is folder=%s", cache.layout.root)

    def _open(self) -> tuple[ModelCache, Downloads]:
        with self._lock:
            if self._closed:
                raise CacheUnusable("the server is stopping")
            if self._opened is None:
                cache = ModelCache(
                    self.settings.root,
                    self.settings.limits,
                    lease_seconds=self.settings.lease_seconds,
                    shared_locks=self.settings.shared_locks,
                )
                objects = ObjectSource()
                sources: dict[Provider, ModelSource] = {
                    model_pb2.HUGGING_FACE: HubSource(cache.layout),
                    model_pb2.S3: objects,
                    model_pb2.GCS: objects,
                    model_pb2.AZURE: objects,
                    model_pb2.FILE: FolderSource(self.settings.file_sources),
                }
                downloads = Downloads(
                    cache,
                    sources,
                    retry=self.settings.retry,
                    ended=self._download_ended,
                    allowed=AllowedSources(self.settings.model_sources),
                    leave_out=partial(left_out, ignore=self.settings.ignore, allow=self.settings.allow),
                )
                keeper = threading.Thread(target=self._keep, args=(cache,), name="cache-keeper", daemon=True)
                self._opened = (cache, downloads, keeper)
                keeper.start()
                _LOG.info("model cache folder=%s", cache.layout.root)
            return self._opened[0], self._opened[1]

    def _keep(self, cache: ModelCache) -> None:
        """Cleans up after other replicas and keeps the limits, which others may exceed: the disk is shared."""
        if cache.leases.is_read_only:
            _LOG.warning(
                "the cache folder is read-only: what it has is served, nothing else folder=%s", cache.layout.root
            )
            self._show_state(True)
            return
        while True:
            try:
                cache.sweep()
                cache.enforce_limits()
                self._show_state(True)
            except CacheFull as error:
                self._show_state(True)
                _LOG.warning("the cache is over its limits reason=%s", error)
            except LeaseLost as error:  # another replica cleans up, or this one is stopping
                _LOG.debug("cleaning up was interrupted reason=%s", error)
            except OSError as error:
                self._show_state(False)
                _LOG.error("the cache folder does not work reason=%s", error)
            except Exception:  # noqa: BLE001 - nobody expected it; without this thread, no limit would hold any more
                self._show_state(False)
                _LOG.exception("the cache cannot be kept within its limits")
            if cache.stopping.wait(self.settings.lease_seconds):
                return
