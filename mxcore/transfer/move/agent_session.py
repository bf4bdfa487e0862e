"""One NIXL agent with a stall time-out, polling that sleeps, and a fence."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from mxcore.errors import CudaError, FenceFailed, NixlError, TransferStalled
from mxcore.memory import merge_adjoining
from mxcore.nixl import Mailbox, NixlAgent, Transfer, load_library, notifies
from mxcore.transfer.layout import Layout, Placement, Regions, merge_regions
from mxcore.transfer.route import (
    Operation,
    ProvenDevice,
    UcxPolicy,
    allocation_regions,
    nixl_device,
    pinning_advice,
    pins_too_little,
    proven_device,
    require_movable,
    ucx_settings,
)
from mxserver.wire.calls import Closing

__all__ = ["FENCE_SECONDS", "AgentSession", "Move"]

logger = logging.getLogger(__name__)

FENCE_SECONDS = 60.0
"""The longest wait for an agent's end; giving back the registration of a large model takes seconds."""

_WAIT_SECONDS = 0.02  # for what is in flight, before `cancelled` is asked again


class Move(NamedTuple):
    """One transfer of the bytes of one chunk: arrays of uint64, of equal length."""

    chunk: int
    local_addresses: array[int]
    remote_addresses: array[int]
    lengths: array[int]
    remote_device: int | None = None  # None: host memory


class AgentSession(Closing):
    """An agent of this process whose memory is `placement`; thread-safe.

    Its name is new every time, so that peers never mistake it for an earlier agent. Only `fence`, which destroys the
    agent, ensures that nothing is written to the memory any more; leaving the context fences, too.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        tls: str,
        backend: str = "UCX",
        stall_timeout_seconds: float = 5.0,
        progress_thread: bool = True,
        fence_timeout_seconds: float = FENCE_SECONDS,
    ) -> None:
        """Without a `progress_thread` of NIXL's own, peers move or connect only within `progressing`.

        Raises NixlMissing, NixlError: also where UCX would use RDMA and hardly any memory may be pinned.
        """
        if pins_too_little() and UcxPolicy("auto", tls).allows("rc"):  # UCX would complain for minutes, then fail
            raise NixlError(f"no agent is made{pinning_advice()}")
        self.stall_timeout_seconds = stall_timeout_seconds
        self._device: ProvenDevice | None = None  # that the registered memory is on
        self._local: dict[str, int | bool] = {"device_index": 0, "device_memory": False}
        load_library()  # takes longest the first time, and reads no settings
        with ucx_settings(tls, backend) as parameters:
            self._agent = NixlAgent(
                f"mx-{worker_id}-{secrets.token_hex(6)}",
                backend=backend,
                backend_params=parameters,
                progress_thread=progress_thread,
            )
        self._fence_timeout_seconds = fence_timeout_seconds
        self._fence_lock = threading.Lock()
        self._fence: _Fence | None = None
        self._has_thread = progress_thread
        self._progress_lock = threading.Lock()
        self._progress_users = 0
        self._progress: threading.Thread | None = None
        self.mailbox = Mailbox()  # of the numbers that peers tell, while `progressing`

    @property
    def name(self) -> str:
        """The agent's name."""
        return self._agent.name

    @property
    def fenced(self) -> bool:
        """Whether the agent is destroyed, and nothing went wrong then."""
        return self._fence is not None and self._fence.held

    @property
    def has_progress_thread(self) -> bool:
        """Whether NIXL has a progress thread: then nothing comes into the `mailbox`."""
        return self._has_thread

    @contextmanager
    def progressing(self) -> Iterator[None]:
        """Within it, a thread polls often, so that peers make progress. May be entered by any number of threads.

        Where a call of NIXL's does not return, it is waited for as long as a fence: that thread is left, and the fence
        fails.
        """
        if self._has_thread:
            yield
            return
        with self._progress_lock:
            self._progress_users += 1
            if self._progress is None:
                self._agent.stop_progressing(False)
                self._progress = threading.Thread(target=self._keep_progressing, name="mx-progress", daemon=True)
                self._progress.start()
        try:
            yield
        finally:
            with self._progress_lock:
                self._progress_users -= 1
                if not self._progress_users and self._progress is not None:
                    self._agent.stop_progressing()
                    self._progress.join(self._fence_timeout_seconds)
                    self._progress = None

    def _keep_progressing(self) -> None:
        with suppress(NixlError):  # the agent was destroyed before this began
            self._agent.keep_progressing(self.mailbox)

    def register(self, layout: Layout, placement: Placement) -> int:
        """Registers all extents, neighbours as one region; returns the number of regions.

        Raises NixlError; LayoutUnsupported for device memory.
        """
        require_movable(placement)
        count = 0
        for regions in self._regions(layout, placement):
            try:
                self._agent.register(regions.addresses, regions.lengths, **self._local)  # type: ignore[arg-type]
            except NixlError as error:
                raise NixlError(f"{error.args[0]}{pinning_advice(sum(regions.lengths))}") from error
            count += len(regions.addresses)
        return count

    def _regions(self, layout: Layout, placement: Placement) -> list[Regions]:
        if placement.device_type == "cpu":
            return merge_regions(placement, layout.extent_bytes)
        self._device = proven_device(placement)
        self._local = nixl_device(self._device.index)
        try:
            return allocation_regions(placement, layout.extent_bytes)
        except CudaError as error:
            raise NixlError(f"the weights cannot be registered: {error}") from error

    def metadata(self) -> bytes:
        """What a peer needs to reach the registered memory."""
        return self._agent.metadata()

    def connect(self, metadata: bytes) -> str:
        """Makes a peer known by its metadata; returns its agent's name. Raises NixlError."""
        return self._agent.load_remote(metadata)

    def disconnect(self, peer: str) -> None:
        """Forgets a peer; does nothing when it is not known or the agent is destroyed."""
        if not self._agent.destroyed:
            self._agent.forget_remote(peer)

    @property
    def notifies(self) -> bool:
        """Whether peers whose agents have no progress thread can be notified of each move."""
        return notifies()

    def post(self, operation: Operation, move: Move, peer: str, *, notify: bool = False) -> tuple[Transfer, bool]:
        """Starts one move; True with it when it is complete already. Raises NixlError, PeerLost.

        With `notify` the peer is notified when the chunk is there.
        """
        # Both sides register neighbours as one region (`merge_regions`), so that these may be one descriptor as well.
        # On devices regions end with their allocation, whatever adjoins.
        local, remote, lengths = move.local_addresses, move.remote_addresses, move.lengths
        if self._device is None and move.remote_device is None:
            local, remote, lengths = merge_adjoining(local, remote, lengths)
        transfer = self._agent.transfer(operation, local, remote, lengths, peer, **self._memory_kinds(move))
        try:
            return transfer, transfer.post(move.chunk if notify else None)
        except NixlError:
            transfer.release()
            del transfer  # the error's traceback would keep it
            raise

    def _memory_kinds(self, move: Move) -> dict[str, Any]:
        remote: Mapping[str, int | bool] = {"device_index": 0, "device_memory": False}
        if move.remote_device is not None:
            remote = nixl_device(move.remote_device)
        return {
            **{f"local_{name}": value for name, value in self._local.items()},
            **{f"remote_{name}": value for name, value in remote.items()},
        }

    def run(
        self,
        operation: Operation,
        moves: Iterable[Move],
        peer: str,
        *,
        in_flight_limit: int,
        notify: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[int]:
        """Runs moves, at most `in_flight_limit` at a time; yields each chunk once its bytes are there.

        When a chunk has arrived, the next one is begun before that one is yielded, so that moving does not wait for the
        caller. With `notify` the peer is notified of each as well. Ends early once `cancelled` returns true; what is in
        flight is then released, not stopped.

        Raises:
            PeerLost: the other side is gone.
            TransferStalled: no chunk was completed for the stall time-out.
        """
        waiting = iter(moves)
        in_flight: dict[int, Transfer] = {}
        completed: list[int] = []
        deadline = time.monotonic() + self.stall_timeout_seconds
        try:
            while not cancelled():
                at_once = False
                while not at_once and len(in_flight) < in_flight_limit and (move := next(waiting, None)) is not None:
                    if not in_flight:
                        deadline = time.monotonic() + self.stall_timeout_seconds
                    in_flight[move.chunk], at_once = self.post(operation, move, peer, notify=notify)
                    if at_once:
                        in_flight.pop(move.chunk).release()
                        completed.append(move.chunk)
                yield from completed
                if not in_flight and not at_once:
                    return
                completed = self._completed(in_flight, 0.0 if at_once else _WAIT_SECONDS)
                if completed or at_once:
                    deadline = time.monotonic() + self.stall_timeout_seconds
                elif time.monotonic() > deadline:
                    raise TransferStalled(
                        f"{operation} with {peer}: chunks {sorted(in_flight)} made no progress for "
                        f"{self.stall_timeout_seconds:g} s"
                    )
        finally:
            for transfer in in_flight.values():
                transfer.release()
            in_flight.clear()

    def _completed(self, in_flight: dict[int, Transfer], seconds: float) -> list[int]:
        """Waits at most `seconds`; removes and returns what has arrived. Raises PeerLost."""
        if not in_flight:
            return []
        chunks = list(in_flight)
        completed = [chunks[i] for i in self._agent.wait_any(list(in_flight.values()), seconds)]
        for chunk in completed:
            in_flight.pop(chunk).release()
        return completed

    def fence(self) -> None:
        """Destroys the agent: when this returns, nothing is read from or written to the memory any more. Idempotent.

        Waits first for the device's work (READs by cuda_ipc): it copies from another process' memory, which is unmapped
        when the agent is destroyed. Raises FenceFailed when the device or NIXL fails (the agent is destroyed all the
        same, if that can be), or does not return in time: then this memory may still be written to, for ever.
        """
        with self._fence_lock:
            if self._fence is None:
                self._fence = _Fence(self._destroy)
        self._fence.wait(self.name, self._fence_timeout_seconds)

    def _destroy(self) -> None:
        try:
            if self._device is not None:
                self._device.context.synchronize()
        finally:
            self._agent.destroy()
        if self._device is not None:
            self._device.context.synchronize()

    def close(self) -> None:
        """Fences it."""
        self.fence()


class _Fence:
    """An agent that is destroyed on a thread of its own, as calls into UCX or the driver may never return."""

    def __init__(self, destroy: Callable[[], None]) -> None:
        self._destroy = destroy
        self._ended = threading.Event()
        self._error: Exception | None = None
        try:
            threading.Thread(target=self._run, name="mx-fence", daemon=True).start()
        except RuntimeError:  # the process may have no more threads
            self._run()

    def _run(self) -> None:
        try:
            self._destroy()
        except Exception as error:  # noqa: BLE001 - whatever it was, memory is not to be trusted: `wait` says so
            self._error = error.with_traceback(None)
        self._ended.set()

    @property
    def held(self) -> bool:
        """Whether it has ended well."""
        return self._ended.is_set() and self._error is None

    def wait(self, name: str, seconds: float) -> None:
        """Raises FenceFailed."""
        if not self._ended.wait(seconds):
            raise FenceFailed(f"agent {name} was not destroyed within {seconds:g} s: its memory is given up")
        if self._error is not None:
            raise FenceFailed(f"agent {name}: {self._error}: its memory is given up") from self._error
