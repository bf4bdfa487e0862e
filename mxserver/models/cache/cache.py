"""The model cache: which models are in it, who uses them, and which are evicted when room is needed."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mxserver.models.cache.eviction import Candidate, Limits, Room, evictable_bytes, eviction_order
from mxserver.models.cache.lease import Lease, LeaseFolder, SharedLocks
from mxserver.models.cache.record_index import RecordIndex
from mxserver.models.cache.removal import remove_empty_folders_below, remove_file_below, remove_link_below
from mxserver.models.cache_layout import CacheLayout, model_id
from mxserver.models.errors import CacheFull, CacheUnusable, ModelInUse, ModelNotCached
from mxserver.models.names import ModelKey, ModelName, is_commit
from mxserver.models.record import BadRecord, ModelRecord, record_from_json, write_in_one_step

_LOG = logging.getLogger(__name__)

HIDDEN_RECORD = "record.json"
"""In a staging folder: the record of a model that is being removed."""

ABANDONED_SECONDS = 86_400


class ModelCache:
    """One cache folder, shared with other replicas. Thread-safe; `close` must be called."""

    def __init__(
        self, root: Path, limits: Limits, *, lease_seconds: float = 30.0, shared_locks: SharedLocks | None = None
    ) -> None:
        """`shared_locks`, which it closes, are those of servers on several machines. Raises CacheUnusable."""
        self.layout = CacheLayout(root)
        self.limits = limits
        self._has_replicas = shared_locks is not None
        try:
            self.layout.make()
            self.leases = LeaseFolder(self.layout.state, lease_seconds, shared_locks)
        except OSError as error:
            raise CacheUnusable(
                f"the cache folder {root} cannot be used ({error.strerror}); set MODEL_EXPRESS_CACHE_DIRECTORY to one "
                "that this process can write"
            ) from error
        self._index = RecordIndex(self.layout.records)
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}  # lease token → bytes that are still to be written

    def close(self) -> None:
        """Idempotent."""
        self.stopping.set()
        self.leases.close()

    # What is there.

    def find(self, model: ModelName, revision: str) -> ModelRecord:
        """The record of a revision, branch or tag.

        Raises:
            ModelNotCached: says whether the model is missing or only that revision; of several replicas, also which one
                this is: another one may have it in a folder of its own.
        """
        commit = revision if is_commit(revision) else self.layout.read_ref(model, revision)
        record = self.record(ModelKey(model, commit)) if commit else None
        if record is None:
            at = f" in revision {revision!r}" if revision else ""
            here = ""
            if self._has_replicas:
                here = f" by the replica {socket.gethostname()} (others may have cache folders of their own)"
            raise ModelNotCached(f"{model.name} is not cached{at}{here}; download it with: mx models get {model.name}")
        return record

    def record(self, key: ModelKey) -> ModelRecord | None:
        return self._index.record(key, self.layout.record(key))

    def records(self) -> list[ModelRecord]:
        """All models, in no order."""
        return self._index.records()

    def last_used(self, key: ModelKey) -> float:
        """Unix time in seconds, by the file system's clock."""
        try:
            return self.layout.record(key).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def reading(self, model: ModelName, revision: str) -> Iterator[ModelRecord]:
        """Keeps a model from being removed while its files are read, by this replica or another.

        Raises:
            ModelNotCached: it is not there.
        """
        key = self.find(model, revision).key
        with self.leases.in_use(key.id):
            # The use mark was made first: a removal hides the record and then looks for use marks.
            record = self.record(key)
            if record is None:
                raise ModelNotCached(f"{key} was removed a moment ago")
            self.touch(key)
            yield record
            self.touch(key)

    def touch(self, key: ModelKey) -> None:
        """Records the use of a model, if the disk allows it."""
        with suppress(OSError):
            os.utime(self.layout.record(key))

    def set_pin(self, key: ModelKey, *, pinned: bool) -> None:
        if pinned:
            self.layout.pin(key).touch()
        else:
            self.layout.pin(key).unlink(missing_ok=True)

    def is_pinned(self, key: ModelKey) -> bool:
        return self.layout.pin(key).exists()

    # What goes.

    def remove(self, key: ModelKey, *, force: bool = False, patience_seconds: float = 0) -> int:
        """Deletes a revision's files, and gives back the bytes of its record.

        Readers have `patience_seconds` to finish: a client that has all bytes may be heard of as a reader for a moment.

        Raises:
            ModelInUse: it is pinned (and `force` is not set), being read, or being downloaded.
            ModelNotCached: it is not there.
        """
        if not force and self.is_pinned(key):
            raise ModelInUse(f"{key} is pinned; unpin it with: mx models pin --off {key.model.name}")
        lease = self.leases.try_acquire(key.id)
        if lease is None:
            raise ModelInUse(f"{key} is being downloaded or removed by this server or another on the same folder")
        try:
            record = self.record(key)
            if record is None:
                raise ModelNotCached(f"{key} is not cached")
            self._wait_for_readers(key, patience_seconds)
            with self.leases.acquired(model_id(key.model), self.stopping):
                self._remove(record, lease)
            return record.size_bytes
        finally:
            self.leases.release(lease)

    def _wait_for_readers(self, key: ModelKey, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.leases.is_used(key.id) and not self.stopping.wait(0.02):
            pass

    def _remove(self, record: ModelRecord, lease: Lease) -> None:
        trash = self.staging(lease)
        hidden, path = trash / HIDDEN_RECORD, self.layout.record(record.key)
        path.replace(hidden)  # from here on no new reader can find it
        if self.leases.is_used(record.key.id):
            hidden.replace(path)
            raise ModelInUse(f"{record.key} is being read")
        self._remove_files(record, trash)

    def _remove_files(self, record: ModelRecord, trash: Path) -> None:
        """Removes what the record lists and nothing else; links, references and files of others stay.

        Can be repeated after an interruption: the hidden record is deleted last.
        """
        key = record.key
        self.set_pin(key, pinned=False)
        root, model_folder = self.layout.root, self.layout.relative(self.layout.model_folder(key.model))
        snapshot = self.layout.relative(self.layout.snapshot(key))
        for file in record.files:
            remove_link_below(root, f"{snapshot}/{file.path}", to=file.place)
            remove_empty_folders_below(root, f"{snapshot}/{file.path}", down_to=model_folder)
        kept = self._places_in_use(key.model)
        for file in record.files:
            if file.place not in kept and file.place.startswith(f"{model_folder}/"):
                remove_file_below(root, file.place)
                remove_empty_folders_below(root, file.place, down_to=model_folder)
        if not os.path.lexists(self.layout.snapshot(key)):  # else others have files there, and names for it
            for ref in self.layout.refs_to(key.model, key.revision):
                name = self.layout.relative(ref)
                remove_file_below(root, name)
                remove_empty_folders_below(root, name, down_to=model_folder)
        shutil.rmtree(trash)
        _LOG.info("removed model=%s bytes=%d", key, record.size_bytes)

    def _places_in_use(self, model: ModelName) -> set[str]:
        """The files that other revisions of a model need, also revisions that others put into the hub's layout."""
        kept = {file.place for record in self.records() if record.key.model == model for file in record.files}
        for link in (self.layout.model_folder(model) / "snapshots").rglob("*"):
            if link.is_symlink():
                place = os.path.normpath(link.parent / link.readlink())
                kept.add(os.path.relpath(place, self.layout.root))
        return kept

    # Room.

    def room(self) -> Room:
        with self._lock:
            own, coming = set(self._coming), sum(self._coming.values())
        staged = sum(_bytes_below(path) for path in self.layout.staging.iterdir() if path.name not in own)
        disk = os.statvfs(self.layout.root)
        written = sum(_bytes_below(self.layout.staging / name) for name in own)
        used = self._index.used_bytes()
        return Room(used + staged + written, disk.f_bavail * disk.f_frsize, max(0, coming - written))

    def make_room(self, lease: Lease, needed_bytes: int) -> None:
        """Makes room for a download of this many bytes, evicting the least recently used models.

        The room stays reserved until `give_back`.

        Raises:
            CacheFull: it does not fit even then; nothing was evicted for it.
        """
        with self._lock:
            self._coming[lease.token] = needed_bytes
        self.enforce_limits()

    def give_back(self, lease: Lease) -> None:
        with self._lock:
            self._coming.pop(lease.token, None)

    def enforce_limits(self) -> int:
        """Evicts until the limits hold; returns how many models went.

        Raises:
            CacheFull: they do not hold even after evicting all that may be evicted.
        """
        evicted = 0
        tried: set[ModelKey] = set()
        while missing := self.room().missing_bytes(self.limits):
            candidates = [one for one in self._candidates() if one.key not in tried]
            if evictable_bytes(candidates, self._places_outside(candidates)) < missing:
                raise CacheFull(self._full(missing))
            tried.add(candidates[0].key)
            with suppress(ModelInUse, ModelNotCached):
                self.remove(candidates[0].key)
                evicted += 1
        return evicted

    def _candidates(self) -> list[Candidate]:
        busy = self.leases.busy()
        return eviction_order(
            Candidate(key, self.last_used(key), {file.place: file.size for file in record.files})
            for record in self.records()
            if not self.is_pinned(key := record.key) and key.id not in busy
        )

    def _places_outside(self, candidates: list[Candidate]) -> set[str]:
        keys = {one.key for one in candidates}
        return {file.place for record in self.records() if record.key not in keys for file in record.files}

    def _full(self, missing: int) -> str:
        room, limits = self.room(), self.limits
        return (
            f"{missing} bytes are missing in {self.layout.root}: {room.used_bytes} are used, {room.coming_bytes} "
            f"to be downloaded, {room.free_bytes} free on the disk; limits: MX_CACHE_MAX_BYTES={limits.max_bytes}, "
            f"MX_CACHE_MIN_FREE_BYTES={limits.min_free_bytes}; models that are pinned or in use are not evicted"
        )

    # Downloads.

    def staging(self, lease: Lease) -> Path:
        """The staging folder of a lease, taken over from its earlier holder, which thereby loses it.

        A download publishes by renaming files out of this folder, so a holder that lost the lease can publish nothing.
        Incomplete files of an earlier holder, which it may still write to, are not taken over.
        """
        folder = self.layout.staging / lease.token
        for old in sorted(self.layout.staging.iterdir()):
            if old.name.rpartition(".")[0] == lease.key and old.name != lease.token:
                if not folder.exists():
                    with suppress(FileNotFoundError):
                        old.rename(folder)
                        shutil.rmtree(folder / "scratch", ignore_errors=True)
                else:
                    shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        return folder

    def sweep(self) -> None:
        """Cleans up after replicas that died: finishes their removals, and deletes downloads that nobody continued for
        a day. Younger ones stay: a download that starts again uses their complete files.
        """
        for folder in list(self.layout.staging.iterdir()):
            if folder.is_file():  # a reference that was not written to its end
                with suppress(FileNotFoundError):
                    if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                        folder.unlink()
                continue
            key = folder.name.rpartition(".")[0]
            with suppress(FileNotFoundError):
                removal = (folder / HIDDEN_RECORD).exists()
                if (removal or time.time() - folder.stat().st_mtime > ABANDONED_SECONDS) and (
                    lease := self.leases.try_acquire(key)
                ):
                    try:
                        self._clear(self.staging(lease))
                    finally:
                        self.leases.release(lease)

    def _clear(self, folder: Path) -> None:
        hidden = folder / HIDDEN_RECORD
        try:
            record = record_from_json(hidden.read_text())
        except (FileNotFoundError, BadRecord, UnicodeDecodeError):
            shutil.rmtree(folder)
            return
        with self.leases.acquired(model_id(record.key.model), self.stopping):
            self._remove_files(record, folder)

    def publish_record(self, record: ModelRecord, scratch: Path) -> None:
        write_in_one_step(self.layout.record(record.key), record.to_json(), scratch)


def _bytes_below(folder: Path) -> int:
    """Bytes of the files in a folder, each counted once. Files that vanish meanwhile are not counted."""
    inodes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(Path(parent, name))
                if found.st_nlink == 1:  # linked into place already: counted there
                    inodes[found.st_ino] = found.st_size
    return sum(inodes.values())
