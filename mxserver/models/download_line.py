"""Work that waits in a line: a fixed number at once, in threads, the rest in the order in which it came.

No ThreadPoolExecutor, since Python waits for that one's threads before it ends: a provider that hangs would keep the
server from ending.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class WorkLine:
    """Runs each work of a name in a daemon thread, at most `most_at_once`. Thread-safe."""

    def __init__(self, name: str, most_at_once: int) -> None:
        self._name = name
        self._most = most_at_once
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._threads: set[threading.Thread] = set()

    def put(self, name: Hashable, work: Callable[[], None]) -> None:
        """Adds work, which must not raise. No other work of this name may be waiting."""
        with self._lock:
            self._waiting[name] = work
            if len(self._threads) < self._most:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.add(thread)
                thread.start()

    def drop(self, name: Hashable) -> bool:
        """Takes work out of the line; False if it has begun, or is not there."""
        with self._lock:
            return self._waiting.pop(name, None) is not None

    def threads(self) -> list[threading.Thread]:
        """The threads that run at the moment."""
        with self._lock:
            return list(self._threads)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return
                _, work = self._waiting.popitem(last=False)
            work()
