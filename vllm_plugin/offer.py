"""What a worker serves to others through its engine's life: paused during sleep, verified before it is served again.

A sleeping engine's weights lie in host memory or nowhere, and the memory that was registered with the network is
unmapped: nobody may be reading there. So readers are waited for (MX_DRAIN_TIMEOUT_SECS), then cut off, before the
engine goes on; and when it is awake again, weights are offered only if every digest is what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mxcore.transfer.layout.digests import ChunkDigests
from mxcore.transfer.layout.layout import Layout, Placement
from mxcore.transfer.member.membership import Membership
from mxcore.transfer.serve.holder import Holder
from vllm_plugin import compat

_log = logging.getLogger(__name__)


class Offer:
    """One worker's weights at one membership. Not thread-safe: the engine calls from one thread.

    `keep_alive` is what holds the memory at `placement`; it is let go with `close`.
    """

    def __init__(
        self,
        membership: Membership,
        layout: Layout,
        placement: Placement,
        scalars: Mapping[str, float],
        keep_alive: object,
    ) -> None:
        self.membership = membership
        self._what = (layout, placement, scalars)
        self._keep_alive = keep_alive
        self._paused: Holder | None = None

    def start(self, digests: ChunkDigests | None = None) -> None:
        """Serves; `digests` as Membership.serve has them, and so the errors."""
        self.membership.serve(*self._what, digests, keep_alive=self._keep_alive)

    def pause(self) -> bool:
        """Before the memory goes away: new readers are refused, those that read are waited for, within bounds.

        False when some were cut off. Idempotent.
        """
        holder = self.membership.holder
        if holder is None:
            return True
        self._paused = holder
        return self.membership.withdraw()

    def resume(self) -> bool:
        """After the memory came back: serves again if the bytes are those that were served; False if they are not.

        Raises what Membership.serve raises.
        """
        holder, self._paused = self._paused, None
        if holder is None:
            return self.membership.holder is not None
        compat.synchronize_all()
        if not holder.unchanged():
            return False
        self.start(holder.digests)
        return True

    def close(self) -> None:
        """Drains, says goodbye, lets go of the memory. Idempotent; never raises."""
        self.membership.close()
        self._paused = None
        self._keep_alive = None
