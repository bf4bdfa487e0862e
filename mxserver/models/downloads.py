"""Running downloads: one for all callers that ask for the same, across all servers on the same cache folder."""

from __future__ import annotations

import errno
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mxserver.models.cache import ModelCache
from mxserver.models.cache_layout import check_paths
from mxserver.models.completeness import missing_files, missing_of, some
from mxserver.models.download_line import WorkLine
from mxserver.models.errors import (
    CacheFull,
    CacheUnusable,
    DownloadFailed,
    DownloadInterrupted,
    DownloadsFull,
    LeaseLost,
    ModelError,
    ModelNotCached,
)
from mxserver.models.names import ModelKey, ModelName, is_commit, is_weight
from mxserver.models.record import ModelRecord
from mxserver.models.sources import AllowedSources, ModelSource, RemoteModel, is_disk_full
from mxserver.models.transfer import NO_PROGRESS, Progress, RetryPolicy, Stopped, Transfer
from mxserver.wire import left_out
from mxserver.wire.files import Provider

_LOG = logging.getLogger(__name__)

DOWNLOADS_AT_ONCE = 4
QUESTIONS_AT_ONCE = 16  # to providers: they take a moment, and models that are cached must not wait for downloads
MOST_DOWNLOADS = 256  # that run or wait

Phase = Literal["resolving", "queued", "waiting", "downloading", "done", "failed"]

_CLOSE_SECONDS = 5.0  # how long downloads may take to notice that the server is stopping


@dataclass(frozen=True, slots=True)
class JobState:
    """A download at one moment. `version` grows with every change; `error` is there when it failed.

    `began`: this server had to download something. Otherwise the cache had it, or another replica downloaded it.
    """

    version: int = 0
    phase: Phase = "resolving"
    message: str = "asking the provider"
    revision: str = ""
    progress: Progress = NO_PROGRESS
    began: bool = False
    error: ModelError | None = None

    @property
    def ended(self) -> bool:
        return self.phase in ("done", "failed")


class DownloadJob:
    """One download, followed by any number of callers. Once it has begun it goes on when callers leave, also after the
    last one: the next caller then finds more of the model. Thread-safe.
    """

    def __init__(self, model: ModelName, revision: str, *, ignore_weights: bool) -> None:
        self.model = model
        self.revision = revision
        self.ignore_weights = ignore_weights
        self.left_out = ""  # what the provider has and is not downloaded
        self.callers = 0  # of `Downloads`, under its lock
        self._changed = threading.Condition()
        self._state = JobState()

    def state(self) -> JobState:
        with self._changed:
            return self._state

    def wait_for_change(self, since: int, timeout_seconds: float) -> JobState:
        """The state, once its version differs from `since` or after the time-out."""
        return self.wait_until(lambda state: state.version != since, timeout_seconds)

    def wait_until(self, enough: Callable[[JobState], bool], timeout_seconds: float) -> JobState:
        """The state, once it is `enough` or after the time-out; it is looked at when it changes, and at `wake`."""
        with self._changed:
            self._changed.wait_for(lambda: enough(self._state), timeout_seconds)
            return self._state

    def wake(self) -> None:
        """Has those that wait look again: what else they wait for has come."""
        with self._changed:
            self._changed.notify_all()

    def show(self, **changes: object) -> None:
        with self._changed:
            changed = replace(self._state, **changes)  # type: ignore[arg-type] # JobState's own fields
            if changed != self._state:
                self._state = replace(changed, version=self._state.version + 1)
                self._changed.notify_all()


_Wanted = tuple[ModelName, str, bool]
_Fetch = Callable[[DownloadJob], ModelRecord]


class Downloads:
    """All downloads of this server. Thread-safe; `close` must be called.

    At most DOWNLOADS_AT_ONCE fetch files and QUESTIONS_AT_ONCE ask providers; the others wait, at most MOST_DOWNLOADS.
    """

    def __init__(
        self,
        cache: ModelCache,
        sources: Mapping[Provider, ModelSource],
        *,
        retry: RetryPolicy | None = None,
        ended: Callable[[DownloadJob], None] = lambda _: None,
        allowed: AllowedSources | None = None,
        leave_out: Callable[[Collection[str]], frozenset[str]] = left_out,
    ) -> None:
        """`ended` is called with every job that has ended, from its thread; `leave_out` says which of a model's files
        are not for download."""
        self._leave_out = leave_out
        self._ended = ended
        self._allowed = allowed or AllowedSources()
        self._cache = cache
        self._sources = sources
        self._retry = retry or RetryPolicy()
        self._lock = threading.Lock()
        self._jobs: dict[_Wanted, DownloadJob] = {}
        self._questions = WorkLine("download-question", QUESTIONS_AT_ONCE)
        self._fetches = WorkLine("download", DOWNLOADS_AT_ONCE)

    def ensure(self, model: ModelName, revision: str, *, ignore_weights: bool = False) -> DownloadJob:
        """Joins a running download, or starts one. `revision` comes from `checked_revision`. Call `leave` at the end.

        Raises:
            DownloadsFull: too many wait already.
            SourceNotAllowed: the server may not download from there.
        """
        self._allowed.require(model)
        wanted = (model, revision, ignore_weights)
        with self._lock:
            job = self._jobs.get(wanted)
            if job is None:
                job = DownloadJob(model, revision, ignore_weights=ignore_weights)
                if self._cache.stopping.is_set():
                    job.show(phase="failed", error=Stopped(f"{model.name}: the server is stopping"))
                    return job
                if len(self._jobs) >= MOST_DOWNLOADS:
                    raise DownloadsFull(
                        f"{model.name} is not downloaded: {MOST_DOWNLOADS} downloads run or wait already, which is the "
                        "limit (MOST_DOWNLOADS); ask again later"
                    )
                self._jobs[wanted] = job
                self._questions.put(wanted, functools.partial(self._run, wanted, job, self._found))
            job.callers += 1
            return job

    def leave(self, job: DownloadJob) -> None:
        """A caller of `ensure` does not wait any more. Without callers, a download that has not begun is cancelled."""
        wanted = (job.model, job.revision, job.ignore_weights)
        with self._lock:
            job.callers -= 1
            if job.callers > 0 or self._jobs.get(wanted) is not job:
                return
            if not (self._questions.drop(wanted) or self._fetches.drop(wanted)):
                return
            del self._jobs[wanted]
        _LOG.info("download is cancelled before it began, nobody waits for it model=%s", job.model)
        job.show(phase="failed", error=Stopped(f"{job.model}: nobody waited for it"))

    def jobs(self) -> list[DownloadJob]:
        """The running downloads, in the order of their start."""
        with self._lock:
            return list(self._jobs.values())

    def running(self) -> int:
        with self._lock:
            return len(self._jobs)

    def close(self) -> None:
        """Ends all downloads and keeps their complete files. Idempotent.

        A download that hangs in a file system is abandoned: its thread is a daemon, and it can publish nothing once its
        lease is released.
        """
        self._cache.stopping.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for line in (self._questions, self._fetches):  # what the first ends may still go into the second
            for thread in line.threads():
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    _LOG.warning("a download does not end and is abandoned thread=%s", thread.name)

    def _run(self, wanted: _Wanted, job: DownloadJob, step: Callable[[DownloadJob], ModelRecord | _Fetch]) -> None:
        """One step of a download: it ends with it, or waits in line for the next."""
        try:
            record = step(job)
            if not isinstance(record, ModelRecord):
                job.show(phase="queued", message=f"waits: at most {DOWNLOADS_AT_ONCE} downloads run at once")
                with self._lock:
                    if job.callers or job.state().began:
                        self._fetches.put(wanted, functools.partial(self._run, wanted, job, record))
                        return
                raise Stopped(f"{job.model}: nobody waited for it")
            if job.state().began:
                _LOG.info("downloaded model=%s bytes=%d files=%d", record.key, record.size_bytes, len(record.files))
            message = f"in the cache; left out: {job.left_out}" if job.left_out else "in the cache"
            end: dict[str, object] = {"phase": "done", "message": message, "revision": record.key.revision}
            end["progress"] = replace(
                job.state().progress,
                bytes_done=record.size_bytes,
                bytes_total=record.size_bytes,
                files_done=len(record.files),
                files_total=len(record.files),
            )
        except ModelError as error:
            _LOG.warning("download failed model=%s revision=%s reason=%s", job.model, job.revision, error)
            end = {"phase": "failed", "message": str(error), "error": error}
        except Exception as error:  # noqa: BLE001 - shown to all who wait, and logged with where it came from
            failure = self._unexpected(job, error)
            end = {"phase": "failed", "message": str(failure), "error": failure}
        with self._lock:  # first: a caller that asks from now on gets a new download
            del self._jobs[wanted]
        job.show(**end)
        self._ended(job)

    def _unexpected(self, job: DownloadJob, error: Exception) -> ModelError:
        """An error that is not a ModelError: one of the disk, or a bug, whose traceback is logged."""
        failure: ModelError | None = None
        if is_disk_full(error):
            failure = CacheFull(
                f"{job.model}: the disk of {self._cache.layout.root} is full; `mx models rm` makes room"
            )
        elif isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            failure = CacheUnusable(f"{job.model}: the cache folder cannot be used: {error}")
        if failure is not None:
            _LOG.warning("download failed model=%s revision=%s reason=%s", job.model, job.revision, failure)
            return failure
        _LOG.exception("download failed model=%s revision=%s", job.model, job.revision)
        return DownloadFailed(f"{job.model}: {type(error).__name__}: {error}")

    def _found(self, job: DownloadJob) -> ModelRecord | _Fetch:
        """The record, if the cache has what the job wants; else the step that fetches it."""
        if self._cache.stopping.is_set():
            raise Stopped(f"{job.model}: the server is stopping")
        source = self._sources[job.model.provider]
        self._cache.layout.require_inside(job.model)
        if is_commit(job.revision) and (record := self._satisfying(ModelKey(job.model, job.revision), job)):
            return record  # a commit's list never changes
        try:
            remote = self._resolve(source, job)
        except DownloadFailed as error:
            return self._cached_instead(job, error)
        remote = self._reduced(remote, job)
        job.show(revision=remote.key.revision)
        check_paths(job.model, [file.path for file in remote.files])
        self._check_complete(remote, job)
        if record := self._satisfying(remote.key, job, remote):
            self._name(remote, job)
            return record
        return functools.partial(self._fetched, source, remote)

    def _fetched(self, source: ModelSource, remote: RemoteModel, job: DownloadJob) -> ModelRecord:
        if self._cache.stopping.is_set():
            raise Stopped(f"{remote.key}: the server is stopping")
        while True:
            try:
                record = self._under_lease(source, remote, job)
            except LeaseLost as error:
                if self._cache.stopping.is_set():
                    raise Stopped(f"{remote.key}: the server is stopping") from error
                _LOG.warning("download was taken over model=%s reason=%s", remote.key, error)
            else:
                return record

    def _resolve(self, source: ModelSource, job: DownloadJob) -> RemoteModel:
        attempt = 1
        while True:
            try:
                return self._ask(source, job)
            except DownloadInterrupted as error:
                if attempt >= self._retry.attempts:
                    raise DownloadFailed(f"{error}; given up after {attempt} attempts") from error
                wait = self._retry.wait_seconds(attempt, error.retry_after_seconds)
                job.show(message=f"asking the provider again in {wait:.0f} s: {error}")
                if self._cache.stopping.wait(wait):
                    raise Stopped(f"{job.model}: the server is stopping") from error
            attempt += 1

    def _ask(self, source: ModelSource, job: DownloadJob) -> RemoteModel:
        """Asks the provider in a thread that can be abandoned: its silence must not delay the server's stop."""
        answer: queue.SimpleQueue[RemoteModel | BaseException] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(source.resolve(job.model, job.revision))
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                answer.put(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        while True:
            try:
                found = answer.get(timeout=0.1)
            except queue.Empty:
                if self._cache.stopping.is_set():
                    raise Stopped(f"{job.model}: the server is stopping") from None
            else:
                if isinstance(found, BaseException):
                    raise found
                return found

    def _cached_instead(self, job: DownloadJob, error: DownloadFailed) -> ModelRecord:
        """The cached revision of a name, for the time in which the provider cannot be asked."""
        try:
            record = self._cache.find(job.model, job.revision)
        except ModelNotCached:
            raise error from None
        missing = missing_of(record, self._cache.layout.root).weights
        if job.ignore_weights:
            missing = ()
        elif not record.has_weights or missing:
            lack = some(missing) if missing else "its weights"
            raise DownloadFailed(f"{error}; the cache has {record.key} without {lack}") from error
        _LOG.warning("the cached revision is used model=%s reason=%s", record.key, error)
        self._cache.touch(record.key)
        return record

    def _reduced(self, remote: RemoteModel, job: DownloadJob) -> RemoteModel:
        """The model without what is left out of downloads, which the job's last message will say."""
        found = {file.path: file for file in remote.files}
        out = self._leave_out({*found, *(remote.listed or ())})
        if not out:
            return remote
        total_bytes = sum(found[name].size or 0 for name in out if name in found)
        job.left_out = f"{len(out)} files of {total_bytes} bytes ({some(out)}), by MX_DOWNLOAD_IGNORE"
        _LOG.info("left out of the download model=%s: %s", remote.key, job.left_out)
        return replace(
            remote,
            files=tuple(file for file in remote.files if file.path not in out),
            listed=None if remote.listed is None else tuple(name for name in remote.listed if name not in out),
        )

    def _check_complete(self, remote: RemoteModel, job: DownloadJob) -> None:
        """Raises DownloadFailed where weights cannot be had; other files that are listed are left out, and named."""
        if not remote.unavailable:
            return
        root = self._cache.layout.snapshot(remote.key)
        found = {file.path for file in remote.files}
        record = self._cache.record(remote.key)
        listed = remote.listed if record is None or record.listed is None else record.listed
        missing = missing_files(found, listed, lambda name: (root / name).read_bytes())
        lack = some(missing.weights)
        if not lack and listed is None and not any(map(is_weight, found)):
            lack = "its weights"
        if lack and not job.ignore_weights:
            raise DownloadFailed(f"{remote.key}: the cache folder lacks {lack}, and {remote.unavailable}")
        if others := [name for name in missing.others if not (job.ignore_weights and is_weight(name))]:
            _LOG.warning(
                "the model is used without files that the hub lists model=%s files=%s", remote.key, some(others)
            )

    def _satisfying(self, key: ModelKey, job: DownloadJob, remote: RemoteModel | None = None) -> ModelRecord | None:
        """The record, if it has all that the job wants of the provider's list, and the files are still there.

        Without `remote` the list that the record has counts.
        """
        record = self._cache.record(key)
        if record is None or not (record.has_weights or job.ignore_weights):
            return None
        if record.listed is None and (remote is None or not remote.unavailable):
            return None  # the list can be had, and is to be recorded
        there = {file.path for file in record.files}
        wanted = [file.path for file in remote.files] if remote else record.listed or ()
        if any(name not in there and not (job.ignore_weights and is_weight(name)) for name in wanted):
            return None
        if any(not (self._cache.layout.root / file.place).exists() for file in record.files):
            _LOG.warning("files are missing, they are downloaded again model=%s", key)
            return None
        self._cache.touch(key)
        return record

    def _under_lease(self, source: ModelSource, remote: RemoteModel, job: DownloadJob) -> ModelRecord:
        key = remote.key
        while True:
            if record := self._satisfying(key, job, remote):
                self._name(remote, job)
                return record
            lease = self._cache.leases.try_acquire(key.id)
            try:
                if record := self._satisfying(key, job, remote):
                    self._name(remote, job)
                    return record
                if lease is not None:
                    job.show(phase="downloading", message="downloading", began=True)
                    wanted = [file for file in remote.files if not (job.ignore_weights and is_weight(file.path))]
                    transfer = Transfer(
                        self._cache, source, remote, lease, self._retry, lambda progress: job.show(progress=progress)
                    )
                    is_light = job.ignore_weights and bool(remote.unavailable)
                    record = transfer.run(wanted, has_weights=len(wanted) == len(remote.files) and not is_light)
                    self._name(remote, job)
                    return record
            finally:
                if lease is not None:
                    self._cache.leases.release(lease)
            job.show(phase="waiting", message="another replica downloads it")
            if self._cache.stopping.wait(0.25):
                raise Stopped(f"{key}: the server is stopping")

    def _name(self, remote: RemoteModel, job: DownloadJob) -> None:
        """Points the requested name to the revision, now that all files are in the cache."""
        if job.revision != remote.key.revision:
            layout = self._cache.layout
            if layout.read_ref(job.model, job.revision) != remote.key.revision:
                layout.write_ref(job.model, job.revision, remote.key.revision, layout.staging)
