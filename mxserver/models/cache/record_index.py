"""The records of a cache folder, read once each and then kept in memory for as long as their files do not change."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from mxserver.models.names import ModelKey
from mxserver.models.record import BadRecord, ModelRecord, record_from_json

_LOG = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]


class RecordIndex:
    """Thread-safe. Other replicas change the folder too: each look lists it, and reads what is new there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[_Stamp, ModelRecord | None]] = {}
        self._places: dict[str, int] | None = None  # of all records: place -> bytes

    def records(self) -> list[ModelRecord]:
        """All records, in no order. Those that are damaged are left out, and told once."""
        with self._lock:
            self._look()
            return [record for _, record in self._known.values() if record is not None]

    def used_bytes(self) -> int:
        """Bytes of all files, those of several records counted once."""
        with self._lock:
            self._look()
            if self._places is None:
                self._places = {}
                for _, record in self._known.values():
                    if record is not None:
                        self._places.update((file.place, file.size) for file in record.files)
            return sum(self._places.values())

    def _look(self) -> None:
        seen: dict[str, tuple[_Stamp, ModelRecord | None]] = {}
        changed = False
        with os.scandir(self._folder) as entries:
            for entry in entries:
                stamp = _stamp(entry) if entry.name.endswith(".json") else None
                if stamp is None:
                    continue
                known = self._known.get(entry.name)
                if known is None or known[0] != stamp:
                    changed = True
                    known = (stamp, read_record(Path(entry.path)))
                seen[entry.name] = known
        if changed or len(seen) != len(self._known):
            self._places = None
        self._known = seen


def _stamp(entry: os.DirEntry[str]) -> _Stamp | None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_record(path: Path, expected: ModelKey | None = None) -> ModelRecord | None:
    """The record in a file; None when there is none, or it is damaged or another model's, which is logged."""
    try:
        record = record_from_json(path.read_text())
        if expected not in (None, record.key):
            raise BadRecord(f"it is the record of {record.key}")
    except FileNotFoundError:
        return None
    except (BadRecord, UnicodeDecodeError) as error:
        _LOG.warning("record is ignored file=%s reason=%s", path, error)
        return None
    return record
