"""The two ways in which asked-for chunks come by NIXL: the receiver READs them, or the holder WRITEs them.

A mover is asked for chunks and says which have arrived. Arrived is not verified.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from mxcore.errors import NotOneSided, SourceRefused, TransferError, TransferStalled
from mxcore.transfer.layout.chunks import Chunks
from mxcore.transfer.move.agent_session import AgentSession, Move
from mxcore.transfer.move.source_client import SourceClient
from mxcore.transfer.move.tcp_received import TcpReceived

__all__ = ["LeaseKeeper", "PullByRead", "PullByWrite"]

_READS_IN_FLIGHT = 4
_CALLS_AT_ONCE = 2  # of PushChunks to one holder
_CALL_SECONDS = 24 * 3600.0  # a deadline for gRPC; ours is the stall time-out


class LeaseKeeper:
    """Renews a lease at a third of its time, from a thread of its own, while the context lasts."""

    def __init__(self, client: SourceClient, lease_id: str) -> None:
        self._client = client
        self._lease_id = lease_id
        self._stop = threading.Event()
        self._failure: TransferError | None = None
        self._thread = threading.Thread(target=self._run, name="mx-lease", daemon=True)

    def check(self) -> None:
        """Raises what renewing raised: without a lease the holder may free what is being read."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            try:
                pause = self._client.renew(self._lease_id) / 3
            except TransferError as error:
                self._failure = error
                return


class PullByRead:
    """READs by this process' agent: for routes that are one-sided for certain.

    By cuda_ipc the first chunk is READ alone, and `tcp` tells after each batch whether it came through a socket: then
    nothing else is READ from this holder.
    """

    needs_this_thread = True  # nothing moves unless `arrived` is called

    def __init__(
        self,
        client: SourceClient,
        lease_id: str,
        session: AgentSession,
        peer: str,
        chunks: Chunks,
        local: array[int],
        remote: array[int],
        remote_device: int | None = None,
        tcp: TcpReceived | None = None,
    ) -> None:
        """`tcp`, made before the two agents were connected: for cuda-ipc."""
        self._lease = LeaseKeeper(client, lease_id)
        self._session = session
        self._peer = peer
        self._chunks = chunks
        self._local = local
        self._remote = remote
        self._remote_device = remote_device
        self._tcp = tcp
        self._tried = False
        self._asked: deque[int] = deque()

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lease.__exit__(kind, error, trace)

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""
        return not self._asked

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""
        self._asked.extend(chunks)

    def arrived(self) -> Iterator[int]:
        """Fetches; yields chunks whose bytes are there. Raises PeerLost, TransferStalled, SourceRefused."""
        self._lease.check()
        trial = self._tcp is not None and not self._tried
        batch = [self._asked.popleft() for _ in range(min(1, len(self._asked)) if trial else len(self._asked))]
        moves = (self._move(chunk) for chunk in batch)
        if self._tcp is None:
            yield from self._session.run("read", moves, self._peer, in_flight_limit=_READS_IN_FLIGHT)
        elif batch:
            yield from self._watched(self._tcp, batch, moves)

    def digest_of(self, chunk: int) -> bytes:
        """None is made on the way: empty."""
        return b""

    def _watched(self, tcp: TcpReceived, batch: Sequence[int], moves: Iterator[Move]) -> Iterator[int]:
        """READs a batch; raises NotOneSided after it if half of its bytes or more came over TCP."""
        tcp.reset()
        yield from self._session.run("read", moves, self._peer, in_flight_limit=_READS_IN_FLIGHT)
        self._tried = True
        if 2 * tcp.bytes() >= sum(map(self._chunks.bytes_of, batch)):
            raise NotOneSided(f"a READ of device memory from {self._peer} came over TCP although cuda_ipc works here")

    def _move(self, chunk: int) -> Move:
        local, remote, lengths = (
            self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)
        )
        return Move(chunk, local, remote, lengths, self._remote_device)


class PullByWrite:
    """Has the holder WRITE chunks, and hears which ones it has written.

    Two calls may run at a time, so that the holder has something to do while the next one begins. The holder's agent
    notifies `session` of each chunk, where it can; a message tells the same afterwards. `arrived` waits no longer than
    until `wake`.
    """

    needs_this_thread = False  # the holder goes on

    def __init__(
        self, client: SourceClient, lease_id: str, session: AgentSession, *, stall_timeout_seconds: float
    ) -> None:
        self._client = client
        self._lease_id = lease_id
        self._mailbox = session.mailbox
        self._notified = not session.has_progress_thread
        self._stall_timeout_seconds = stall_timeout_seconds
        self._asked: deque[int] = deque()
        self._expected: set[int] = set()
        self._error: TransferError | None = None
        self._calls: dict[threading.Thread, Any] = {}
        self._ended: deque[threading.Thread] = deque()  # of these, appended by themselves
        self._news = 0.0  # when something last arrived, or the first chunk of several was asked for

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for call in self._calls.values():
            call.cancel()
        for thread in self._calls:
            thread.join()

    def interrupt(self, error: TransferError) -> None:
        """Makes `arrived` raise `error` instead of waiting on; from any thread."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Makes `arrived` return; from any thread."""
        self._mailbox.wake()

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""
        return not self._asked and not self._expected

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""
        if self.idle:
            self._news = time.monotonic()
        self._asked.extend(chunks)
        self._start()

    def arrived(self) -> Iterator[int]:
        """Waits for the holder; yields chunks that it has written. Raises what the call raised, TransferStalled."""
        self._start()
        if not self._expected:
            return
        stalled_at = self._news + self._stall_timeout_seconds
        for chunk in self._mailbox.take(stalled_at - time.monotonic()):
            if chunk in self._expected:  # it is told twice
                self._expected.remove(chunk)
                self._news = time.monotonic()
                yield chunk
        if self._error is not None:
            raise self._error
        if self._expected and time.monotonic() > self._news + self._stall_timeout_seconds:
            raise TransferStalled(
                f"worker {self._client.source.worker_id} wrote none of chunks {sorted(self._expected)[:5]} for "
                f"{time.monotonic() - self._news:.1f} s"
            )

    def digest_of(self, chunk: int) -> bytes:
        """None is made on the way: empty."""
        return b""

    def _start(self) -> None:
        """Begins a call with all that is asked for and in none yet, if there is room for one."""
        while self._ended:
            del self._calls[self._ended.popleft()]
        if not self._asked or len(self._calls) >= _CALLS_AT_ONCE:
            return
        batch = list(self._asked)
        self._asked.clear()
        self._expected.update(batch)
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
