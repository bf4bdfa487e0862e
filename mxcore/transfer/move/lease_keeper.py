"""A lease that is renewed while a transfer goes on."""

from __future__ import annotations

import threading
import time

from mxcore.errors import SourceUnreachable, TransferError
from mxcore.transfer.move.source_client import SourceClient
from mxserver.wire.calls import Closing

__all__ = ["LeaseKeeper"]

FIRST_LEASE_SECONDS = 5.0  # what a new one lasts at least, before the holder has said how long
AGAIN_SECONDS = 0.5  # after a renewal without an answer


class LeaseKeeper(Closing):
    """Renews a lease at a third of its time, on a thread of its own, until it is closed.

    A renewal that is not answered is repeated until the lease is over by this worker's clock: a holder that is busy for
    seconds keeps its readers. One that is refused is over at once.
    """

    def __init__(self, client: SourceClient, lease_id: str) -> None:
        self._client = client
        self._lease_id = lease_id
        self._stop = threading.Event()
        self._failure: TransferError | None = None
        self._thread = threading.Thread(target=self._run, name="mx-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what renewing raised: without a lease the holder may free what is being read."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Renews it no more, and waits for a call that runs. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause, until = 0.0, time.monotonic() + FIRST_LEASE_SECONDS
        while not self._stop.wait(pause):
            asked_at = time.monotonic()  # the holder counts from later on
            try:
                lease_seconds = self._client.renew(self._lease_id)
                pause, until = lease_seconds / 3, asked_at + lease_seconds
            except SourceUnreachable as error:
                pause = AGAIN_SECONDS
                if time.monotonic() + pause >= until:
                    self._failure = error
                    return
            except TransferError as error:
                self._failure = error
                return
