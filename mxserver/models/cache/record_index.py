"""The records of a cache folder, read once each and then kept in memory for as long as their files do not change."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from mxserver.models.names import ModelKey
from mxserver.models.record import BadRecord, ModelRecord, record_from_json

_LOG = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]


class _Known(NamedTuple):
    stamp: _Stamp
    text_digest: int
    record: ModelRecord | None  # None: it is damaged


class RecordIndex:
    """Thread-safe. Other replicas change the folder too: each look asks for the files' times.

    A use of a model changes the time of its record. So what has another time is read, and parsed only where its text is
    another one: a record of 10,000 files takes a tenth of a second to parse.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._places: dict[str, int] | None = None  # of all records: place -> bytes

    def record(self, key: ModelKey, path: Path) -> ModelRecord | None:
        """The record in a file of the folder; None where there is none, or it is damaged, or that of another model."""
        with self._lock:
            try:
                known = self._read(path, _stamp(path.stat()))
            except FileNotFoundError:
                return None
        if known.record is not None and known.record.key != key:
            _LOG.warning("record is ignored file=%s reason=it is the record of %s", path, known.record.key)
            return None
        return known.record

    def records(self) -> list[ModelRecord]:
        """All records, in no order. Those that are damaged are left out, and told once."""
        with self._lock:
            self._look()
            return [known.record for known in self._known.values() if known.record is not None]

    def used_bytes(self) -> int:
        """Bytes of all files, those of several records counted once."""
        with self._lock:
            self._look()
            if self._places is None:
                self._places = {}
                for known in self._known.values():
                    if known.record is not None:
                        self._places.update((file.place, file.size) for file in known.record.files)
            return sum(self._places.values())

    def _look(self) -> None:
        seen: dict[str, _Known] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".json"):
                    with suppress(FileNotFoundError):
                        seen[entry.name] = self._read(Path(entry.path), _stamp(entry.stat()))
        if len(seen) != len(self._known):
            self._places = None
        self._known = seen

    def _read(self, path: Path, stamp: _Stamp) -> _Known:
        """What is known of a file, which is read where its stamp is another one. Raises FileNotFoundError."""
        known = self._known.get(path.name)
        if known is not None and known.stamp == stamp:
            return known
        data = path.read_bytes()
        digest = xxhash.xxh3_128_intdigest(data)
        if known is None or known.text_digest != digest:
            self._places = None
            known = _Known(stamp, digest, _parsed(data, path))
        self._known[path.name] = known = known._replace(stamp=stamp)
        return known


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _parsed(data: bytes, path: Path) -> ModelRecord | None:
    """None for a damaged one, which is logged."""
    try:
        return record_from_json(data.decode())
    except (BadRecord, UnicodeDecodeError) as error:
        _LOG.warning("record is ignored file=%s reason=%s", path, error)
        return None
