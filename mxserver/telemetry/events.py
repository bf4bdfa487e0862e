"""Recent problems, for the status page: a short list in memory."""

from __future__ import annotations

import re
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from mxserver.store import Clock

EventKind = Literal["store", "epoch", "lease", "fallback", "call", "download", "doubt", "refusal"]

KEPT_EVENTS = 50
LONGEST_TEXT = 300

_USER_INFO = re.compile(r"//[^/@\s]+@")  # user:password@ in a URL (RFC 3986, 3.2.1)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that went wrong, `count` times in a row; `at_ms` is Unix time of the last one."""

    at_ms: int
    kind: EventKind
    text: str
    count: int = 1


class Events:
    """The last events, newest first. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def add(self, kind: EventKind, text: str) -> None:
        """Adds an event. If it equals the newest one, only its count grows. User and password in URLs are removed."""
        text = bounded(_USER_INFO.sub("//", text), LONGEST_TEXT)
        now = self._clock.unix_ms()
        with self._lock:
            last = self._kept[0] if self._kept else None
            if last and (last.kind, last.text) == (kind, text):
                self._kept[0] = replace(last, at_ms=now, count=last.count + 1)
            else:
                self._kept.appendleft(Event(now, kind, text))

    def newest(self) -> list[Event]:
        with self._lock:
            return list(self._kept)


def bounded(text: str, longest: int) -> str:
    """The text in one line and cut to `longest` characters: clients send it, and a page shows it."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
