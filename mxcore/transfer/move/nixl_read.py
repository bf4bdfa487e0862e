"""Chunks that this process' NIXL agent READs out of the holder's memory."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from mxcore.errors import TransferError
from mxcore.transfer.layout import Chunks
from mxcore.transfer.move.agent_session import AgentSession, Move
from mxcore.transfer.move.movers import Arrived
from mxserver.wire.calls import Closing

__all__ = ["NixlReadMover"]

_READS_IN_FLIGHT = 4


class NixlReadMover(Closing):
    """READs by `session`, for routes that are one-sided for certain. See Mover.

    Nothing moves but in `arrived`, which therefore waits for its own READs alone and need not be woken.
    """

    def __init__(
        self,
        session: AgentSession,
        peer: str,
        chunks: Chunks,
        local: array[int],
        remote: array[int],
        remote_device: int | None = None,
    ) -> None:
        self._session = session
        self._peer = peer
        self._chunks = chunks
        self._local = local
        self._remote = remote
        self._remote_device = remote_device
        self._asked: deque[int] = deque()
        self._error: TransferError | None = None

    def close(self) -> None:
        """Nothing: what is in flight ends with the agent."""

    def wake(self) -> None:
        """Nothing: `arrived` does not wait for others."""

    def interrupt(self, error: TransferError) -> None:
        """See Mover; what is in flight is abandoned."""
        self._error = self._error or error

    @property
    def idle(self) -> bool:
        """See Mover."""
        return not self._asked

    def ask(self, chunks: Sequence[int]) -> None:
        """See Mover."""
        self._asked.extend(chunks)

    def arrived(self) -> Iterator[Arrived]:
        """READs all that is asked for; see Mover."""
        batch = [self._asked.popleft() for _ in range(len(self._asked))]
        moves = map(self._move, batch)
        for chunk in self._session.run(
            "read", moves, self._peer, in_flight_limit=_READS_IN_FLIGHT, cancelled=lambda: self._error is not None
        ):
            yield Arrived(chunk)
        if self._error is not None:
            raise self._error

    def _move(self, chunk: int) -> Move:
        local, remote, lengths = (
            self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)
        )
        return Move(chunk, local, remote, lengths, self._remote_device)
