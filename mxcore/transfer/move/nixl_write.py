"""Chunks that the holder's NIXL agent WRITEs into this process' memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from mxcore.errors import FenceFailed, SourceRefused, TransferError
from mxcore.transfer.move.agent_session import FENCE_SECONDS, AgentSession
from mxcore.transfer.move.movers import Arrived, Awaited
from mxcore.transfer.move.source_client import SourceClient
from mxserver.wire.calls import Closing

__all__ = ["NixlWriteMover"]

_CALLS_AT_ONCE = 2  # of PushChunks to one holder
_CALL_SECONDS = 24 * 3600.0  # a deadline for gRPC; ours is the stall time-out


class NixlWriteMover(Closing):
    """Asks the holder to WRITE chunks, and hears which ones it has written. See Mover.

    Two calls may run at a time, so that the holder has something to do while the next one begins. The holder's agent
    notifies `session` of each chunk, where it can; a message tells the same afterwards.
    """

    def __init__(
        self, client: SourceClient, lease_id: str, session: AgentSession, *, stall_timeout_seconds: float
    ) -> None:
        self._client = client
        self._lease_id = lease_id
        self._mailbox = session.mailbox
        self._notified = not session.has_progress_thread
        self._awaited = Awaited(f"worker {client.source.worker_id} wrote none of", stall_timeout_seconds)
        self._asked: deque[int] = deque()  # in no call yet
        self._calls: dict[threading.Thread, Any] = {}
        self._ended: deque[threading.Thread] = deque()  # of these, appended by themselves

    def close(self) -> None:
        """Cancels the calls that run. What the holder still writes ends with the fence."""
        for call in self._calls.values():
            call.cancel()
        for thread in self._calls:
            thread.join(FENCE_SECONDS)
            if thread.is_alive():
                raise FenceFailed("a call that was cancelled has not ended")

    def interrupt(self, error: TransferError) -> None:
        """See Mover."""
        self._awaited.interrupt(error)
        self.wake()

    def wake(self) -> None:
        """See Mover."""
        self._mailbox.wake()

    @property
    def idle(self) -> bool:
        """See Mover."""
        return not self._asked and not self._awaited.chunks

    def ask(self, chunks: Sequence[int]) -> None:
        """See Mover."""
        self._asked.extend(chunks)
        self._start()

    def arrived(self) -> Iterator[Arrived]:
        """See Mover. Raises what a call raised, too."""
        self._start()
        if self._awaited.chunks:
            for chunk in self._mailbox.take(self._awaited.seconds_left):
                if chunk in self._awaited.chunks:  # it is told twice
                    self._awaited.remove(chunk)
                    yield Arrived(chunk)
        self._awaited.check()

    def _start(self) -> None:
        """Begins a call with all that is asked for and in none yet, if there is room for one."""
        while self._ended:
            del self._calls[self._ended.popleft()]
        if not self._asked or len(self._calls) >= _CALLS_AT_ONCE:
            return
        batch = list(self._asked)
        self._asked.clear()
        self._awaited.add(batch)
        call = self._client.push_chunks(self._lease_id, batch, _CALL_SECONDS, notify=self._notified)
        thread = threading.Thread(target=self._pump, args=(call, batch), name="mx-push-results", daemon=True)
        self._calls[thread] = call
        thread.start()

    def _pump(self, call: Any, batch: Sequence[int]) -> None:
        """On a thread of its own: a call's answers into the mailbox, each chunk of its batch once, or an error."""
        left = set(batch)
        try:
            for result in call:
                if not result.written:
                    raise SourceRefused(result.error)
                for chunk in (result.chunk, *result.others):
                    if chunk not in left:
                        raise self._wrong(f"wrote chunk {chunk}, which was not asked for")
                    left.remove(chunk)
                    self._mailbox.put(chunk)
            if left:
                raise self._wrong(f"ended its answer with chunks {sorted(left)[:5]} missing")
        except grpc.RpcError as error:
            self.interrupt(self._client.as_error("PushChunks", error))
        except TransferError as error:
            call.cancel()
            self.interrupt(error)
        finally:
            self._ended.append(threading.current_thread())
            self.wake()  # there is room for the next call

    def _wrong(self, what: str) -> SourceRefused:
        return SourceRefused(f"worker {self._client.source.worker_id} {what}")
