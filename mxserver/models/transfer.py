"""One download under a lease: fetch, check, put into place, and only then make it known."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mxserver.models.cache import Lease, ModelCache
from mxserver.models.cache_layout import model_id
from mxserver.models.completeness import missing_files, some
from mxserver.models.digests import digest_fd, git_blob_sha1
from mxserver.models.errors import CacheFull, DownloadFailed, DownloadInterrupted, ModelError
from mxserver.models.record import FileRecord, ModelRecord, sync_folder
from mxserver.models.sources import ModelSource, RemoteFile, RemoteModel, is_disk_full
from mxserver.wire import says_what_belongs
from mxserver.wire.proto import model_pb2

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and the waits between: doubled each time, never less than the provider asks for."""

    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def wait_seconds(self, attempt: int, asked: float) -> float:
        wait = min(self.first_wait_seconds * 2.0 ** (attempt - 1), self.longest_wait_seconds)
        return max(asked, wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, hides nothing


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is. `bytes_fetched` of `bytes_done` came from the provider in this download."""

    bytes_done: int = 0
    bytes_total: int = 0
    files_done: int = 0
    files_total: int = 0
    bytes_fetched: int = 0


NO_PROGRESS = Progress()

_LOOK_SECONDS = 0.25
_SHARE_OF_LOOKING = 0.1
"""Of the time of a download with many files: each look at what has come goes through all of them."""


class Stopped(ModelError):
    """The server is stopping; the download goes on when somebody asks again."""

    code = "MX_SERVER_STOPS"


@dataclass(frozen=True, slots=True)
class _Done:
    """A complete, checked file in the staging folder. Its name, PATH_HASH.SIZE.DIGEST.BLOB, lets a later holder of the
    lease use it."""

    file: RemoteFile
    staged: Path
    size: int
    digest: str
    blob: str


class Transfer:
    """Downloads the wanted files of one revision. Used once, by one thread; `run` does it all."""

    def __init__(
        self,
        cache: ModelCache,
        source: ModelSource,
        remote: RemoteModel,
        lease: Lease,
        retry: RetryPolicy,
        show: Callable[[Progress], None],
    ) -> None:
        self._cache = cache
        self._source = source
        self._remote = remote
        self._lease = lease
        self._retry = retry
        self._show = show
        self._staging = cache.staging(lease)
        self._scratch = self._staging / "scratch"
        self._stopping = threading.Event()
        self._done: dict[str, _Done] = {}
        self._kept_bytes = 0
        self._total_bytes = 0

    def run(self, wanted: list[RemoteFile], *, has_weights: bool) -> ModelRecord:
        """Returns the record once it is in the cache. `wanted` are files of the model.

        Raises:
            DownloadFailed, DownloadInterrupted: the provider does not deliver it, after all retries.
            CacheFull: there is no room.
            LeaseLost: another replica has taken over.
            Stopped: the server is stopping.
        """
        try:
            self._scratch.mkdir(exist_ok=True)
            missing = self._reuse(wanted)
            self._total_bytes = sum(file.size or 0 for file in wanted)
            self._cache.make_room(self._lease, sum(file.size or 0 for file in missing))
            lists = [file for file in missing if says_what_belongs(file.path)]
            if lists:
                self._fetch_all(lists, len(wanted))
            if has_weights and self._remote.key.model.provider != model_pb2.HUGGING_FACE:  # which lists whole commits
                self._check_weights(wanted)
            self._fetch_all([file for file in missing if file not in lists], len(wanted))
            record = self._publish(wanted, has_weights)
            shutil.rmtree(self._staging, ignore_errors=True)
        except (CacheFull, OSError) as error:
            self._lease.check()  # a staging folder that vanished is how a lost lease shows first
            raise self._as_model_error(error) from error
        finally:
            self._stopping.set()
            self._cache.give_back(self._lease)
        return record

    def _check_weights(self, wanted: list[RemoteFile]) -> None:
        """Raises DownloadFailed where a part of the weights is not among the files, before the others are fetched."""
        names = {file.path for file in wanted}
        if lack := missing_files(names, None, lambda name: self._done[name].staged.read_bytes()).weights:
            raise DownloadFailed(
                f"{self._remote.key} lacks {some(lack)}, by its index or its files' numbers: is the upload complete?"
            )

    def _as_model_error(self, error: CacheFull | OSError) -> ModelError:
        if isinstance(error, CacheFull) or is_disk_full(error):
            shutil.rmtree(self._staging, ignore_errors=True)  # an incomplete model must not keep the disk full
            return CacheFull(error.args[0] if isinstance(error, CacheFull) else f"{self._remote.key}: the disk is full")
        return DownloadFailed(f"{self._remote.key} cannot be written: {error}")

    # What is there already.

    def _reuse(self, wanted: list[RemoteFile]) -> list[RemoteFile]:
        """Takes the files that an earlier attempt or another revision left; returns the missing ones."""
        known = {
            file.place: file
            for record in self._cache.records()
            if record.key.model == self._remote.key.model
            for file in record.files
        }
        left = {path.name.partition(".")[0]: path for path in self._staging.iterdir() if path.is_file()}
        missing = []
        for file in wanted:
            done = self._left_over(file, left.get(_path_hash(file))) or self._in_place(file, known)
            if done is None:
                missing.append(file)
            else:
                self._done[file.path] = done
                self._kept_bytes += done.size
            self._check_running()
        return missing

    def _left_over(self, file: RemoteFile, staged: Path | None) -> _Done | None:
        if staged is None:
            return None
        _, size, digest, blob = staged.name.split(".")
        if staged.stat().st_size != int(size) or (file.blob and blob != file.blob):
            return None
        return _Done(file, staged, int(size), f"xxh3-64:{digest}", blob)

    def _in_place(self, file: RemoteFile, known: dict[str, FileRecord]) -> _Done | None:
        """A file that is in the cache, hard-linked so that nobody can remove it meanwhile."""
        layout, key = self._cache.layout, self._remote.key
        place = layout.place(key, file.path, file.blob) if file.blob else ""
        for found in (layout.root / place if place else layout.root, layout.snapshot(key) / file.path):
            real = Path(os.path.realpath(found))
            if not real.is_file() or not real.is_relative_to(layout.root):
                continue
            linked = self._scratch / _path_hash(file)
            linked.unlink(missing_ok=True)
            try:
                linked.hardlink_to(real)
            except OSError as error:  # of another user (fs.protected_hardlinks), or on another disk
                _LOG.info("file is copied, since it cannot be linked place=%s reason=%s", real, error)
                try:
                    self._cache.make_room(self._lease, real.stat().st_size)
                    shutil.copyfile(real, linked)
                except OSError as unread:
                    if is_disk_full(unread):
                        raise
                    _LOG.warning("file is fetched again, since it cannot be read place=%s reason=%s", real, unread)
                    continue
            record = known.get(str(real.relative_to(layout.root)))
            if record and record.size == linked.stat().st_size and file.size in (None, record.size):
                return self._keep(file, linked, record.size, record.digest, file.blob or _blob_name(record.digest))
            with suppress(DownloadInterrupted):  # other bytes than the provider's: fetched again
                return self._checked(file, linked)
        return None

    # Fetching.

    def _fetch_all(self, missing: list[RemoteFile], total_files: int) -> None:
        """Worker threads fetch; this one shows the progress. They are daemons: some calls cannot be interrupted."""
        tasks: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        results: queue.SimpleQueue[_Done | BaseException] = queue.SimpleQueue()
        for file in sorted(missing, key=lambda file: -(file.size or 0)):
            tasks.put(file)
        for number in range(min(self._source.parallel_files, len(missing))):
            threading.Thread(target=self._work, args=(tasks, results), name=f"download-{number}", daemon=True).start()
        left, look_again = len(missing), 0.0
        while left:
            if (now := time.monotonic()) >= look_again:
                self._check_running()
                self._lease.check()
                self._show_progress(total_files)
                took = time.monotonic() - now
                look_again = now + took + max(_LOOK_SECONDS, took / _SHARE_OF_LOOKING)
            with suppress(queue.Empty):
                result = results.get(timeout=_LOOK_SECONDS)
                if isinstance(result, BaseException):
                    raise result
                self._done[result.file.path] = result
                left -= 1
        self._show_progress(total_files)

    def _work(self, tasks: queue.SimpleQueue[RemoteFile], results: queue.SimpleQueue[_Done | BaseException]) -> None:
        with suppress(queue.Empty):
            while not self._stopping.is_set():
                file = tasks.get_nowait()
                try:
                    results.put(self._fetch(file))
                except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                    results.put(error)
                    return

    def _fetch(self, file: RemoteFile) -> _Done:
        attempt = 1
        while True:
            try:
                return self._checked(file, self._source.fetch(self._remote, file, self._scratch, self._stopping))
            except DownloadInterrupted as error:
                if is_disk_full(error):
                    self._after_disk_full(error)
                if attempt >= self._retry.attempts:
                    raise DownloadFailed(f"{error}; given up after {attempt} attempts") from error
                wait = self._retry.wait_seconds(attempt, error.retry_after_seconds)
                _LOG.warning("download is tried again attempt=%d wait_s=%.1f reason=%s", attempt, wait, error)
                if self._stopping.wait(wait):
                    raise
            attempt += 1

    def _after_disk_full(self, error: DownloadInterrupted) -> None:
        """Called if others filled the disk, or the provider gave no sizes: goes on if something could be evicted."""
        if not self._cache.enforce_limits():
            raise CacheFull(f"{error}; nothing is left to evict in {self._cache.layout.root}") from error

    def _checked(self, file: RemoteFile, found: Path) -> _Done:
        """Compares a fetched file with what the provider promises, and keeps it. Raises DownloadInterrupted."""
        size = found.stat().st_size
        if file.size not in (None, size):
            found.unlink()
            raise DownloadInterrupted(f"{file.path} has {size} bytes, but the provider lists {file.size}")
        sha256 = hashlib.sha256()
        git = git_blob_sha1(size)
        hub = self._remote.key.model.provider == model_pb2.HUGGING_FACE
        others = [*([sha256] if file.sha256 or (hub and not file.blob) else []), *([git] if file.git_sha1 else [])]
        handle = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _, digest = digest_fd(handle, *others, progress=lambda _: self._check_running())
            os.fsync(handle)
        finally:
            os.close(handle)
        for promised, made in ((file.sha256, sha256), (file.git_sha1, git)):
            if promised and promised != made.hexdigest():
                found.unlink()
                raise DownloadInterrupted(
                    f"{file.path} does not have the content that the provider lists: {made.name} is "
                    f"{made.hexdigest()}, not {promised}"
                )
        return self._keep(file, found, size, digest, file.blob or sha256.hexdigest())

    def _keep(self, file: RemoteFile, found: Path, size: int, digest: str, blob: str) -> _Done:
        staged = self._staging / f"{_path_hash(file)}.{size}.{digest.partition(':')[2]}.{blob}"
        found.replace(staged)
        return _Done(file, staged, size, digest, blob)

    # Putting into place.

    def _publish(self, wanted: list[RemoteFile], has_weights: bool) -> ModelRecord:
        cache, key = self._cache, self._remote.key
        with cache.leases.acquired(model_id(key.model), cache.stopping):
            files = {file.path: file for file in self._already_recorded()}
            for file in wanted:
                self._lease.check()
                files[file.path] = self._put_into_place(self._done[file.path])
            record = ModelRecord(
                key,
                tuple(files[path] for path in sorted(files)),
                has_weights,
                time.time_ns() // 1_000_000,
                None if self._remote.unavailable else self._remote.listed,
            )
            self._lease.check()
            cache.publish_record(record, self._staging)
        return record

    def _already_recorded(self) -> tuple[FileRecord, ...]:
        record = self._cache.record(self._remote.key)
        return record.files if record else ()

    def _put_into_place(self, done: _Done) -> FileRecord:
        layout, key = self._cache.layout, self._remote.key
        place = layout.place(key, done.file.path, done.blob)
        final = layout.root / place
        final.parent.mkdir(parents=True, exist_ok=True)
        done.staged.replace(final)
        sync_folder(final.parent)
        if key.model.provider == model_pb2.HUGGING_FACE:
            layout.link(key, done.file.path, place, self._staging)
        return FileRecord(done.file.path, done.size, done.digest, place)

    # While it runs.

    def _check_running(self) -> None:
        if self._cache.stopping.is_set():
            raise Stopped(f"{self._remote.key}: the server is stopping; complete files are kept for the next download")

    def _show_progress(self, total_files: int) -> None:
        done = sum(one.size for one in self._done.values())
        coming = 0
        for parent, _, names in os.walk(self._scratch):
            for name in names:
                with suppress(FileNotFoundError):
                    found = os.lstat(Path(parent, name))
                    coming += found.st_size if found.st_nlink == 1 and stat.S_ISREG(found.st_mode) else 0
        total = max(self._total_bytes, done)
        bytes_done = min(done + coming, total)
        self._show(Progress(bytes_done, total, len(self._done), total_files, max(0, bytes_done - self._kept_bytes)))


def _path_hash(file: RemoteFile) -> str:
    return hashlib.sha256(file.path.encode()).hexdigest()[:32]


def _blob_name(digest: str) -> str:
    """A name for a blob whose provider gives none."""
    return hashlib.sha256(digest.encode()).hexdigest()
