"""A worker looks at its own weights while it serves them: memory can break, and a reader by RDMA can write."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from mxcore.metrics import SELF_CHECK_SECONDS, SELF_CHECKED, SELF_CHECKED_WRONG
from mxcore.transfer.move import FENCE_SECONDS
from mxcore.transfer.serve.holder import Holder
from mxserver.wire import MxError

__all__ = ["SelfCheck", "pause_after"]

logger = logging.getLogger(__name__)

_SHARE = 0.01  # of a core's time, or of a device's for digests
_ROUND_SECONDS = 0.0025  # of digests, before the next pause
_LEAST_PAUSE_SECONDS = 0.25
_FIRST_ROUND_BYTES = 16 << 20
_MOST_ROUND_BYTES = 1 << 30


def pause_after(spent_seconds: float, share: float) -> float:
    """How long to pause after so much work, so that work is at most `share` of the time."""
    return max(_LEAST_PAUSE_SECONDS, spent_seconds * (1 / share - 1))


class SelfCheck:
    """Compares a holder's chunks with their digests, one after the other and again, on a thread of its own.

    It takes `share` of the time of a core, or of the device as far as that makes digests. A chunk that differs twice
    ends it: `found_wrong` is called on its thread with the chunks of that round. Start it when every chunk is there;
    `stop` it before the memory goes away or changes. Thread-safe.
    """

    def __init__(self, holder: Holder, found_wrong: Callable[[Sequence[int]], None], *, share: float = _SHARE) -> None:
        self._holder = holder
        self._found_wrong = found_wrong
        self._share = share
        self._on_device = holder.placement.device_type != "cpu"
        self._round_bytes = _FIRST_ROUND_BYTES
        self._device_bytes_per_second = 0.0  # the best seen: a busy device's other work is not ours
        self._next = 0
        self._changed = threading.Condition()
        self._doubted: dict[int, None] = {}
        self._stopped = False
        self._longest_seconds = FENCE_SECONDS
        self._thread = threading.Thread(target=self._run, name="mx-self-check", daemon=True)

    def start(self) -> None:
        """Starts the thread. Call it once."""
        self._thread.start()

    def doubt(self, chunks: Iterable[int]) -> None:
        """These are looked at first, the next one at once; more of them at the pace of all others."""
        count = len(self._holder.chunks)
        with self._changed:
            self._doubted.update(dict.fromkeys(chunk for chunk in chunks if 0 <= chunk < count))
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends it and waits for the digests that are being made, except on its own thread. Idempotent.

        A device may never end them: then the holder's memory is never freed.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(self._longest_seconds)
            if self._thread.is_alive():
                self._holder.never_free()

    def _run(self) -> None:
        try:
            wrong = self._until_wrong()
        except MxError as error:  # the device fails: the engine will say more
            logger.warning("this worker cannot look at its weights any more: %s", error)
            return
        if wrong:
            self._found_wrong(wrong)

    def _until_wrong(self) -> list[int]:
        """Empty: it was stopped. Raises CudaError, HostMemoryLimit."""
        was_doubted = False
        pause_seconds = _LEAST_PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(self._must_not_wait if was_doubted else self._has_news, pause_seconds)
                if self._stopped:
                    return []
                was_doubted = bool(self._doubted)
                first = self._doubted.popitem()[0] if was_doubted else self._next
            end = first + 1 if was_doubted else self._end_of_round(first)
            wrong, spent_seconds = self._look(first, end)
            SELF_CHECKED.add(amount=end - first)
            SELF_CHECKED_WRONG.add(amount=len(wrong))
            SELF_CHECK_SECONDS.add(amount=spent_seconds)
            if wrong:
                return wrong
            if was_doubted:
                logger.info("a reader refused chunk %d; here it is what its digest promises", first)
            else:
                self._next = end % len(self._holder.chunks)
                self._set_round(spent_seconds)
            pause_seconds = pause_after(spent_seconds, self._share)

    def _must_not_wait(self) -> bool:
        return self._stopped

    def _has_news(self) -> bool:
        return self._stopped or bool(self._doubted)

    def _look(self, first: int, end: int) -> tuple[list[int], float]:
        """The chunks of this range that are wrong, and the seconds of digests that it took."""
        clock = time.monotonic if self._on_device else time.thread_time
        began = clock()
        wrong = self._holder.wrong_chunks(first, end)
        spent = clock() - began
        if self._on_device:
            size_bytes = sum(map(self._holder.chunks.bytes_of, range(first, end)))
            self._device_bytes_per_second = max(self._device_bytes_per_second, size_bytes / max(spent, 1e-9))
            spent = size_bytes / self._device_bytes_per_second
        return [chunk for chunk in wrong if self._holder.wrong_chunks(chunk, chunk + 1)], spent

    def _end_of_round(self, first: int) -> int:
        chunks = self._holder.chunks
        return min(len(chunks), first + max(1, self._round_bytes // chunks.chunk_bytes))

    def _set_round(self, spent_seconds: float) -> None:
        if spent_seconds < _ROUND_SECONDS:
            self._round_bytes = min(2 * self._round_bytes, _MOST_ROUND_BYTES)
        elif spent_seconds > 4 * _ROUND_SECONDS:
            self._round_bytes = max(self._round_bytes // 2, self._holder.chunks.chunk_bytes)
