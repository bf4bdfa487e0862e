"""A NIXL agent through the C interface of the installed wheel; nothing is loaded before the first agent.

What NIXL's own Python wrapper cannot set is set here: the progress thread sleeps between its looks (the wrapper's
spins, 71 to 100 % of a core; here about 1 %), and the agent may be used by several threads (sync mode RW). All calls
release the GIL. Thread-safe throughout. NIXL checks no bytes: digests are the caller's.
"""

from collections.abc import Mapping
from typing import Literal

from mxcore.memory import Uint64Buffer
from mxcore.nixl.mailbox import Mailbox
from mxcore.nixl.table import load_library as load_library

def live_agents() -> int:
    """Agents that exist and are not destroyed."""

def live_transfers() -> int:
    """Transfer objects that exist."""

class NixlAgent:
    """One agent with one backend; it exists only when both work. Must be destroyed, best by `destroy`.

    `backend_params` are handed to the backend's plugin. `progress_delay_us`: the longest sleep of the progress
    thread; events wake it earlier, so that throughput does not depend on it. Raises NixlMissing (no library, no
    plugin, backend does not start) and NixlError.

    Without a `progress_thread` nothing moves but while somebody asks a transfer whether it is `done`, or another thread
    is in `keep_progressing`; nor do peers connect.
    """

    def __init__(
        self,
        name: str,
        *,
        backend: str = "UCX",
        backend_params: Mapping[str, str] | None = None,
        progress_delay_us: int = 4000,
        progress_thread: bool = True,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def destroyed(self) -> bool: ...
    def register(
        self,
        addresses: Uint64Buffer,
        lengths: Uint64Buffer,
        *,
        device_index: int = 0,
        device_memory: bool = False,
    ) -> int:
        """Registers stretches of memory (addresses and lengths in bytes); returns a number for `deregister`.

        The memory must stay mapped until the agent is destroyed: peers may go on reading after `deregister`.
        Raises NixlError.
        """

    def deregister(self, registration: int) -> None:
        """Takes a registration out of the metadata; does not stop peers that have older metadata."""

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and the regions registered so far (about 44 bytes a region)."""

    def load_remote(self, metadata: bytes) -> str:
        """Makes a peer known by its `metadata`; returns its name. Raises NixlError for damaged metadata."""

    def forget_remote(self, remote_agent: str) -> bool:
        """Closes the connection to a peer; False when it was not known."""

    def transfer(
        self,
        operation: Literal["read", "write"],
        local_addresses: Uint64Buffer,
        remote_addresses: Uint64Buffer,
        lengths: Uint64Buffer,
        remote_agent: str,
        *,
        local_device_index: int = 0,
        remote_device_index: int = 0,
        local_device_memory: bool = False,
        remote_device_memory: bool = False,
    ) -> Transfer:
        """Prepares a transfer of as many stretches as there are lengths; nothing moves before `Transfer.post`.

        Raises NixlError for addresses outside of registered regions and for an unknown peer.
        """

    def keep_progressing(self, mailbox: Mailbox) -> None:
        """Moves what there is to move, again and again with pauses of about 0.1 ms, until it is told to stop.

        Numbers that peers told with their transfers (`Transfer.post`) go into the mailbox.

        For a thread of its own, one at a time; without the GIL. Raises NixlError when the agent is destroyed already.
        """

    def stop_progressing(self, stopped: bool = True) -> None:
        """Ends `keep_progressing`, or (False) lets the next one begin."""

    def wait_any(self, transfers: list[Transfer], seconds: float) -> list[int]:
        """Waits until one of these transfers of this agent is done, for so long at most; the indices of all that are.

        Looks every 0.1 ms, without the GIL, and moves what there is to move. One thread waits for a transfer, and
        nobody releases it meanwhile. `destroy` waits for this. Raises PeerLost, NixlError.
        """

    def destroy(self) -> None:
        """Waits for calls in progress, drops all transfers, then the agent: afterwards no byte arrives any more.

        Idempotent; every later call on the agent or its transfers raises NixlError. Waits as long as NIXL does: a bound
        is AgentSession's. Raises FenceFailed when NIXL does not destroy it.
        """

class Transfer:
    """A prepared transfer; made by `NixlAgent.transfer`, keeps its agent alive."""

    @property
    def operation(self) -> str: ...
    @property
    def remote_agent(self) -> str: ...
    def post(self, number: int | None = None) -> bool:
        """Starts the transfer; True when it is already complete. Raises PeerLost.

        The peer is told the `number` (32 bits) when the bytes are there, if this NIXL `notifies`.
        """

    def done(self) -> bool:
        """True when all bytes have arrived, False while it is in progress. Raises PeerLost."""

    def release(self) -> None:
        """Frees the transfer. What is in flight is not stopped by it: only `NixlAgent.destroy` does that."""
