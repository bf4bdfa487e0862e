"""Chunks that this process' NIXL agent READs out of the holder's memory."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from mxcore.errors import NotOneSided, TransferError
from mxcore.transfer.layout import Chunks
from mxcore.transfer.move.agent_session import AgentSession, Move
from mxcore.transfer.move.movers import Arrived
from mxcore.transfer.move.tcp_received import TcpByteCounter
from mxserver.wire.calls import Closing

__all__ = ["NixlReadMover"]

_READS_IN_FLIGHT = 4


class NixlReadMover(Closing):
    """READs by `session`, for routes that are one-sided for certain. See Mover.

    Nothing moves but in `arrived`, which therefore waits for its own READs alone and need not be woken.

    By cuda_ipc the first chunk is READ alone, and `tcp` tells after each batch whether it came through a socket: then
    nothing else is READ from this holder, and `arrived` raises NotOneSided.
    """

    def __init__(
        self,
        session: AgentSession,
        peer: str,
        chunks: Chunks,
        local: array[int],
        remote: array[int],
        remote_device: int | None = None,
        tcp: TcpByteCounter | None = None,
    ) -> None:
        """`tcp`, made before the two agents were connected: for cuda-ipc."""
        self._session = session
        self._peer = peer
        self._chunks = chunks
        self._local = local
        self._remote = remote
        self._remote_device = remote_device
        self._tcp = tcp
        self._tried = False
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
        trial = self._tcp is not None and not self._tried
        batch = [self._asked.popleft() for _ in range(min(1, len(self._asked)) if trial else len(self._asked))]
        if batch and self._tcp is not None:
            self._tcp.reset()
        moves = map(self._move, batch)
        for chunk in self._session.run(
            "read", moves, self._peer, in_flight_limit=_READS_IN_FLIGHT, cancelled=lambda: self._error is not None
        ):
            yield Arrived(chunk)
        if self._error is not None:
            raise self._error
        if batch and self._tcp is not None:
            self._tried = True
            if 2 * self._tcp.bytes() >= sum(map(self._chunks.bytes_of, batch)):  # half of the bytes or more
                raise NotOneSided(
                    f"a READ of device memory from {self._peer} came over TCP although cuda_ipc works here"
                )

    def _move(self, chunk: int) -> Move:
        local, remote, lengths = (
            self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)
        )
        return Move(chunk, local, remote, lengths, self._remote_device)
