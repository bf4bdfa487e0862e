"""What processes use of the cores during a run, every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from mxbench.control.processes import cpu_seconds

__all__ = ["CoreShares"]

EVERY_SECONDS = 5.0


class CoreShares:
    """A context manager. `found` has (seconds since `began`, cores used by each group) for each stretch of time."""

    def __init__(self, began: float, **groups: Sequence[int]) -> None:
        """`groups` are process ids by name; `began` is a moment of the monotonic clock."""
        self.found: list[tuple[float, dict[str, float]]] = []
        self._began, self._groups = began, groups
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        at, used = time.monotonic(), self._used()
        while not self._over.wait(EVERY_SECONDS):
            now, uses = time.monotonic(), self._used()
            shares = {name: round((uses[name] - used[name]) / (now - at), 2) for name in uses}
            self.found.append((round(now - self._began, 1), shares))
            at, used = now, uses

    def _used(self) -> dict[str, float]:
        found = {}
        for name, pids in self._groups.items():
            found[name] = 0.0
            for pid in pids:
                with suppress(OSError):  # it has ended
                    found[name] += cpu_seconds(pid)
        return found
