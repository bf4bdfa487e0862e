"""A lease that is renewed while a transfer goes on."""

from __future__ import annotations

import threading

from mxcore.errors import TransferError
from mxcore.transfer.move.source_client import SourceClient
from mxserver.wire.calls import Closing

__all__ = ["LeaseKeeper"]


class LeaseKeeper(Closing):
    """Renews a lease at a third of its time, on a thread of its own, until it is closed."""

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
        pause = 0.0
        while not self._stop.wait(pause):
            try:
                pause = self._client.renew(self._lease_id) / 3
            except TransferError as error:
                self._failure = error
                return
