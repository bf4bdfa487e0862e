"""Agreement between the processes of one engine: what one of them cannot do, none of them does.

Building and processing a model have collectives, so that all processes have to try the same place at the same time. A
thread of each process tells the others, round after round, whether its work is under way, done or failed. A step is
agreed on when all have done it, and given up as soon as one has failed; every process sees the same rounds, and so
decides the same. It knows neither an engine nor torch.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from mxserver.wire import MxError

__all__ = ["LEAST_STALL_SECONDS", "MESSAGE_BYTES", "Agreement", "Gather", "SiblingFailed"]

MESSAGE_BYTES = 512
"""The size of every message that is gathered."""

Gather: TypeAlias = Callable[[bytes, float], "list[bytes]"]
"""Takes this process' message (MESSAGE_BYTES) and a limit in seconds, and gives those of all processes in one order.
Called by one thread that is not the loading one. Raises RuntimeError when a process does not answer in time."""

LEAST_STALL_SECONDS = 20.0
"""Loading holds the interpreter's lock for seconds at times: who is silent for less is not taken for dead."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.25
_TEXT_BYTES = 400

_logger = logging.getLogger(__name__)


class SiblingFailed(MxError):
    """Another process of this engine failed or could not try this place, so that this one leaves it too."""

    code = "MX_SIBLING_FAILED"


class Agreement:
    """One process' part. Without `gather` it is alone: nothing is sent, and it agrees with itself.

    `agree` is for one thread. Calls of the processes are matched by their order. `trouble` is what the last one gave.
    """

    def __init__(self, gather: Gather | None = None) -> None:
        self.stall_seconds = LEAST_STALL_SECONDS
        self.trouble = ""
        self._is_alone = gather is None
        self._changed = threading.Condition()
        self._state: tuple[str, str] = ("busy", "")  # busy, yes, no or gone; and why
        self._decisions: deque[str] = deque()  # of steps that this process has not come to the end of
        self._broken = ""
        self._thread: threading.Thread | None = None
        if gather is not None:
            self._thread = threading.Thread(target=self._run, args=(gather,), name="mx-agreement", daemon=True)
            self._thread.start()

    def is_given_up(self) -> bool:
        """Whether another process has failed at the step that is under way here. Thread-safe."""
        with self._changed:
            return bool(self._decisions) or bool(self._broken)

    def agree(self, trouble: str = "") -> str:
        """Ends a step, without or with trouble, and waits for the others: empty when all of them did it.

        Otherwise who failed and why; whoever has failed is answered at once.
        """
        if self._is_alone:
            self.trouble = trouble
            return trouble
        with self._changed:
            if not self._decisions and not self._broken:
                self._state = ("no", trouble) if trouble else ("yes", "")
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._decisions or self._broken)
            self.trouble = self._decisions.popleft() if self._decisions else self._broken
            return self.trouble

    def leave(self) -> None:
        """From here on this process is alone; the others leave at the same step. Idempotent."""
        self._is_alone = True
        with self._changed:
            self._state = ("gone", "")
            self._changed.notify_all()

    def close(self) -> None:
        """Leaves; returns when the others have left too, or do not answer. Idempotent."""
        self.leave()
        if self._thread is not None:
            self._thread.join(2 * self.stall_seconds)

    def _run(self, gather: Gather) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                sent = self._state
            try:
                states = [_read(message) for message in gather(_written(*sent), self.stall_seconds)]
            except Exception as error:  # noqa: BLE001 - whatever it was, there is no agreement any more
                self._break(f"a process of this engine does not answer: {' '.join(str(error).split())[:_TEXT_BYTES]}")
                return
            kinds = {kind for kind, _text in states}
            if kinds == {"gone"}:
                return
            if "gone" in kinds and kinds & {"yes", "no"}:  # it raised: nothing can be agreed on with it
                ranks = [rank for rank, (kind, _text) in enumerate(states) if kind == "gone"]
                self._break(f"process {ranks[0]} of this engine has ended its load")
                return
            if "no" in kinds or kinds == {"yes"}:
                refused = [f"process {rank}: {text}" for rank, (kind, text) in enumerate(states) if kind == "no"]
                self._decide("; ".join(refused))
                pause = _FIRST_PAUSE_SECONDS
                continue
            with self._changed:
                self._changed.wait_for(lambda sent=sent: self._state != sent, pause)  # type: ignore[misc]
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    def _decide(self, decision: str) -> None:
        with self._changed:
            if self._state[0] != "gone":
                self._state = ("busy", "")
            self._decisions.append(decision)
            self._changed.notify_all()

    def _break(self, reason: str) -> None:
        _logger.warning("weights are loaded without agreement from here on: %s", reason)
        with self._changed:
            self._broken = reason
            self._changed.notify_all()


def _written(kind: str, text: str) -> bytes:
    short = text.encode("ascii", "replace")[: _TEXT_BYTES // 2].decode("ascii")  # escaped, it is at most twice as long
    printable = "".join(letter if letter.isprintable() else " " for letter in short)
    return json.dumps([kind, printable]).encode().ljust(MESSAGE_BYTES)


def _read(message: bytes) -> tuple[str, str]:
    kind, text = json.loads(message)
    return str(kind), str(text)
