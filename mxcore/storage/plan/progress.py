"""How far a load is, for whoever watches: a bar on a terminal, lines in a log."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["Progress", "ProgressDisplay"]

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total; from one thread, about ten times a second and at the end."""

_LINE_SECONDS = 10.0


class ProgressDisplay:
    """A `Progress` for a load: tqdm's bar if `file` is a terminal and tqdm is there, else a log line every 10 seconds.

    A load that is done before the first line is due writes none. Use as a context manager, from one thread.
    """

    def __init__(self, what: str, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._started = self._told = clock()
        self._bar: Any = None
        self._tqdm: Any = _tqdm() if self._file.isatty() else None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._tqdm is not None:
            self._draw(done_bytes, total_bytes)
            return
        now = self._clock()
        if now - self._told >= _LINE_SECONDS:
            self._told = now
            speed = done_bytes / (now - self._started) / 1e9
            percent = 100 * done_bytes // max(total_bytes, 1)
            _log.info(
                "%s: %d%%, %.1f of %.1f GB, %.2f GB/s", self._what, percent, done_bytes / 1e9, total_bytes / 1e9, speed
            )

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None and self._tqdm is not None:
            self._bar = self._tqdm(
                total=total_bytes, desc=self._what, unit="B", unit_scale=True, file=self._file, dynamic_ncols=True
            )
        self._bar.update(done_bytes - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
