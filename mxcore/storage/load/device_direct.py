"""GPUDirect Storage: from the disk straight into device memory, for what the page cache does not have.

Nothing is assumed of it. For each file system and device a process asks, in this order: is it allowed, is nvidia-fs
there, does libcufile open in a process of its own (`cufile_trial`), does it open here without its compatibility mode
and take the file, do known bytes of the file come right (`direct_proof`). The first no is one line in the log, and the
pinned ring reads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from mxcore.errors import CudaError, CuFileError
from mxcore.reading import DeviceRing, FileHandles, FileSet, cufile
from mxcore.storage.load.cufile_trial import trial
from mxcore.storage.load.direct_proof import ROOM_BYTES, prove
from mxcore.storage.plan import Row, tell_once
from mxserver.wire import environment

__all__ = ["DirectReads", "DirectStorage", "chosen", "probe", "why_not"]

_log = logging.getLogger(__name__)

SETTING = "MX_GPUDIRECT_STORAGE"
Choice = Literal["auto", "off"]
ROOT = Path("/")


class DirectStorage(NamedTuple):
    """What there is of it. `not_used_because` is "" where nothing speaks against trying it on a file."""

    kernel_module: bool
    version: str  # of libcufile, "" where it was not looked for, or is not there
    not_used_because: str


def probe() -> DirectStorage:
    """Looks for kernel module, device nodes and library, in this order; opens no driver. Never raises."""
    if not (ROOT / "proc/driver/nvidia-fs").is_dir():
        return DirectStorage(False, "", "the kernel module nvidia-fs is not loaded")
    if not any((ROOT / "dev").glob("nvidia-fs*")):
        return DirectStorage(True, "", "nvidia-fs is loaded, but its /dev/nvidia-fs* are not here (in a container?)")
    try:
        return DirectStorage(True, ".".join(map(str, cufile.version())), "")
    except CuFileError as error:
        return DirectStorage(True, "", str(error.args[0]))


def chosen(choice: str | None, environ: Mapping[str, str] = os.environ) -> Choice:
    """The argument, or MX_GPUDIRECT_STORAGE, or auto. A wrong setting warns; a wrong argument raises ValueError."""
    known = get_args(Choice)
    text = choice if choice is not None else (environment.setting(environ, SETTING) or "auto").lower()
    if text in known:
        return cast(Choice, text)
    if choice is not None:
        raise ValueError(f"gpudirect_storage is {choice!r}, has to be one of {', '.join(known)}")
    tell_once(logging.WARNING, f"{SETTING}={text!r} is refused: it is one of {', '.join(known)}; auto is used")
    return "auto"


_verdicts: dict[tuple[int, int], str] = {}  # (file system's device number, CUDA device) → why not, "" if it is proven
_trials: dict[int, str] = {}  # file system's device number → what the process of its own said
_lock = threading.Lock()  # of both, held while they are found out


_NO_ROW: Row = (0, 0, 0, 0, 0, 0, 0)


class DirectReads:
    """What one Reader's files read by cuFile. Close it before the files are closed. One thread at a time."""

    def __init__(self, files: FileSet, choice: Choice) -> None:
        self._files = files
        self._allowed = choice == "auto"
        self._handles: FileHandles | None = None
        self._device: int | None = None  # the first that is read to; for another one the ring reads
        self._seen: set[int] = set()  # files that were judged

    def handles(self, ring: DeviceRing, rows: Sequence[Row]) -> FileHandles | None:
        """Handles of those files of a load that cuFile may read to the ring's device; None if there are none.

        What is not known yet is proven, on memory that `rows` are going to overwrite. `ring` has to be at rest.
        """
        index = ring.context.index
        if not self._allowed or self._device not in (None, index):
            return None
        self._device = index
        largest: dict[int, Row] = {}
        for row in rows:
            if row[2] >= ROOM_BYTES and row[2] > largest.get(row[0], _NO_ROW)[2]:
                largest[row[0]] = row
        for file in sorted(largest.keys() - self._seen):
            self._seen.add(file)
            self._judge(file, largest[file], ring)
        return self._handles

    def _judge(self, file: int, row: Row, ring: DeviceRing) -> None:
        """Registers a file if its file system is proven for that device, after proving it where nobody did."""
        key = (os.fstat(self._files.descriptor(file)).st_dev, ring.context.index)
        with _lock:
            known = _verdicts.get(key)
            if known is None:
                _verdicts[key] = reason = self._proven(file, row, ring, key[0])
                _tell(self._files.paths[file], ring.context.index, reason)
            elif not known:
                _verdicts[key] = reason = self._taken(file)
                if reason:
                    _tell(self._files.paths[file], ring.context.index, reason)

    def _proven(self, file: int, row: Row, ring: DeviceRing, file_system: int) -> str:
        if reason := probe().not_used_because:
            return reason
        if file_system not in _trials:
            _trials[file_system] = trial(self._files.paths[file])
        if reason := _trials[file_system] or self._taken(file):
            return reason
        assert self._handles is not None  # noqa: S101 - it took the file
        try:
            prove(self._handles, ring, row)
        except (CuFileError, CudaError) as error:
            self._drop(file)
            return str(error.args[0])
        return ""

    def _taken(self, file: int) -> str:
        try:
            if self._handles is None:
                self._handles = FileHandles(self._files)
            self._handles.register(file)
        except CuFileError as error:
            self._drop(file)
            return str(error.args[0])
        return ""

    def _drop(self, file: int) -> None:
        if self._handles is not None:
            self._handles.deregister(file)
            if not any(self._handles.registered(index) for index in range(len(self._files))):
                self.close()

    def give_up(self) -> None:
        """After a read that failed: none of cuFile's is under way any more, and this process uses it no more there."""
        if self._handles is None or self._device is None:
            return
        failure = self._handles.failure()
        reason = str(failure.args[0]) if failure is not None else "a read failed"
        used = [file for file in range(len(self._files)) if self._handles.registered(file)]
        self.close()
        with _lock:
            for file in used:
                _verdicts[os.fstat(self._files.descriptor(file)).st_dev, self._device] = reason
        _log.warning("GPUDirect Storage is given up, what is left comes through pinned memory: %s", reason)

    def close(self) -> None:
        """Deregisters the files; idempotent. cuFile that does not end is told, and not opened again."""
        handles, self._handles = self._handles, None
        if handles is not None:
            try:
                handles.close()
            except CuFileError as error:
                _log.warning("%s: it may hold device memory to the end of this process", error)


def _tell(path: str, index: int, reason: str) -> None:
    place = f"the file system of {path} to device {index}"
    if reason:
        _log.info("GPUDirect Storage is not used from %s: %s", place, reason)
    else:
        _log.info("GPUDirect Storage is used from %s, where the page cache has nothing: known bytes came right", place)


def why_not(path: Path, device_index: int) -> str:
    """Why no load of this process reads that file straight to that device; "" if one does, or none has asked."""
    return _verdicts.get((path.stat().st_dev, device_index), "")


def forget_verdicts() -> None:
    """Everything is asked anew, by the next load."""
    with _lock:
        _verdicts.clear()
        _trials.clear()
