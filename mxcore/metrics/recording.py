"""Counts of this process, in files that are still there when it was killed.

The files are those of prometheus_client's multiprocess mode, which the exporter adds up with that library. Its own
counters are not used here: whether they write to files is decided by an environment variable for a whole process, when
it is first imported, and would be decided for the engine's own metrics as well.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["FILE_BYTES", "Family", "Recorder", "record", "recorded"]

Kind = Literal["counter", "gauge", "histogram"]
UNKNOWN = "unknown"
FILE_BYTES = 128 << 10
"""Of each file, there before it is written to: a write that found no room on the disk would end the process."""
_PREFIXES = {"counter": "counter", "histogram": "histogram", "gauge": "gauge_livesum"}


class Family(NamedTuple):
    """One metric; a counter's name is given with its `_total`. Its labels take the values that are listed alone."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()  # of each label
    buckets: tuple[float, ...] = ()

    def add(self, *labels: str, amount: float = 1.0) -> None:
        """Counts, where this process counts; thread-safe, never raises or waits. Another label's value is "unknown"."""
        if _recorder is not None:
            _recorder.add(self, labels, amount)

    def observe(self, seconds: float, *labels: str) -> None:
        """As `add`, of a histogram."""
        if _recorder is not None:
            _recorder.observe(self, labels, seconds)

    def series(self) -> Iterator[tuple[str, ...]]:
        """All that its labels can be."""
        return product(*((*values, UNKNOWN) for values in self.values))


class Recorder:
    """Counts of one process in files of their own within `folder`, which the process keeps locked. Thread-safe."""

    def __init__(self, folder: Path, families: tuple[Family, ...]) -> None:
        """All series are there at once, with 0: a rate needs one before its first event. Raises OSError."""
        from prometheus_client import mmap_dict, utils  # a worker without metrics has no use for them

        open_file: Callable[[str], Any] = mmap_dict.MmapedDict
        self._key_of: Callable[..., str] = mmap_dict.mmap_key
        self._bound: Callable[[float], str] = utils.floatToGoString
        self._process = os.getpid()
        self._id = uuid.uuid4().hex  # not the process id: that is given again
        self._lock = threading.Lock()
        self._keys: dict[tuple[str, str, tuple[str, ...]], str] = {}
        self._files: dict[str, Any] = {}
        self._alive = _locked(folder, self._id)
        for prefix in _PREFIXES.values():
            path = folder / f"{prefix}_{self._id}.db"
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
            self._files[prefix] = open_file(str(path))
        for family in families:
            for labels in family.series():
                if family.kind == "histogram":
                    self._observe(family, labels, 0.0, 0.0)
                else:
                    self._add(family, family.name, labels, 0.0)

    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None:
        """Adds to a counter or a gauge."""
        with self._lock:
            self._add(family, family.name, _known(family, labels), amount)

    def observe(self, family: Family, labels: tuple[str, ...], seconds: float) -> None:
        """Adds to a histogram."""
        with self._lock:
            self._observe(family, _known(family, labels), seconds, 1.0)

    def leave(self) -> None:
        """An orderly end: this rank is not missed. Idempotent; a child that was forked does nothing."""
        if os.getpid() == self._process:
            self._alive.unlink(missing_ok=True)

    def close(self) -> None:
        """After `leave`; it counts no more."""
        with self._lock:
            for file in self._files.values():
                file.close()

    def _observe(self, family: Family, labels: tuple[str, ...], seconds: float, count: float) -> None:
        bounds = (*family.buckets, float("inf"))
        self._add(family, f"{family.name}_sum", labels, seconds * count)
        for bound in bounds if not count else [next(bound for bound in bounds if seconds <= bound)]:
            self._add(family, f"{family.name}_bucket", (*labels, self._bound(bound)), count)

    def _add(self, family: Family, sample: str, labels: tuple[str, ...], amount: float) -> None:
        known = (family.name, sample, labels)
        key = self._keys.get(known)
        if key is None:
            names = (*family.labels, "le")[: len(labels)]
            name = family.name.removesuffix("_total")
            key = self._keys[known] = self._key_of(name, sample, names, labels, family.meaning)
        file = self._files[_PREFIXES[family.kind]]
        file.write_value(key, file.read_value(key)[0] + amount, 0.0)


def _known(family: Family, labels: tuple[str, ...]) -> tuple[str, ...]:
    pairs = zip(labels, family.values, strict=True)
    return tuple(label if label in values else UNKNOWN for label, values in pairs)


def _locked(folder: Path, identity: str) -> Path:
    """The file whose lock says that this process lives; the kernel drops it, whatever the process dies of.

    It has its name when it is locked. Children that are forked do not have the lock.
    """
    path, beside = folder / f"rank_{identity}", folder / f".rank_{identity}"
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)  # never closed: that would drop it
    beside.rename(path)
    return path


_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """Where this process counts from now on; None: nowhere."""
    global _recorder
    _recorder = recorder


def recorded() -> Recorder | None:
    """Where this process counts."""
    return _recorder


os.register_at_fork(after_in_child=lambda: record(None))
