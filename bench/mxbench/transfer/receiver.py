"""The receiver of `mx bench transfer`: a worker that looks at digests or not, as it is told by `verify on|off`."""

from __future__ import annotations

from mxbench.fleet.model_worker import ModelWorker, be
from mxcore.process import AttachedReads
from mxcore.transfer.move import same_host as attached_pull
from mxcore.transfer.move import threads_of
from mxcore.transfer.receive import ReceivedChunks

_verify = ReceivedChunks.verify


class _NotLookedAt:
    """Chunks that are read and not hashed."""

    def __init__(self, pid: int, *, threads: int, hashed: bool) -> None:
        self._reads = AttachedReads(pid, threads=threads, hashed=False)
        self.ask, self.wake, self.close = self._reads.ask, self._reads.wake, self._reads.close

    def ended(self, seconds: float) -> list[tuple[int, int, bytes]]:
        return [(key, error, b"a digest") for key, error, _ in self._reads.ended(seconds)]


def _threads_without_hashing(cores: int, *, hashed: bool) -> int:
    return threads_of(cores, hashed=False)


def _right_unseen(self: ReceivedChunks, chunk: int, made: bytes | None = None) -> bool:
    return True


class Receiver(ModelWorker):
    """The difference between on and off is what checking costs."""

    def take(self, told: str, *words: str) -> None:
        """See ModelWorker."""
        if told != "verify":
            super().take(told, *words)
            return
        on = words[0] == "on"
        ReceivedChunks.verify = _verify if on else _right_unseen  # type: ignore[method-assign]
        attached_pull.threads_of = threads_of if on else _threads_without_hashing
        attached_pull.AttachedReads = AttachedReads if on else _NotLookedAt  # type: ignore[attr-defined, assignment]


if __name__ == "__main__":
    be(Receiver)
