"""The election of the one worker that reads storage for all with the same weights and rank."""

from __future__ import annotations

import logging
import threading

from mxserver.wire import WireError
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import mx_pb2

__all__ = ["StorageElection"]

logger = logging.getLogger(__name__)

_LEASE_FRACTION = 3  # renewed at a third of the lease: two calls may fail


class StorageElection:
    """This worker's part in the election for (source id, rank). While it is elected, a thread renews that; thread-safe.

    A worker that loses it while reading (the server was away for too long) reads on; another one may then read storage
    as well.
    """

    def __init__(
        self, client: ServerClient, source_id: str, worker_rank: int, worker_id: str, domain: str = ""
    ) -> None:
        """`domain`: where workers are that may take weights from each other; empty: everywhere."""
        self.source_id = source_id
        self._domain = domain
        self._client = client
        self._worker_rank = worker_rank
        self._worker_id = worker_id
        self._epoch = 0
        self._stepped_down = threading.Event()
        self._thread: threading.Thread | None = None

    def stand(self) -> mx_pb2.TakeStorageTurnResponse:
        """Asks to be elected; once elected, this worker stays so until `end`. Raises WireError."""
        answer = self._take(0)
        if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
            self._epoch = answer.epoch
            pause = answer.lease_ms / 1000 / _LEASE_FRACTION
            self._thread = threading.Thread(target=self._keep, args=(pause,), name="mx-storage-turn", daemon=True)
            self._thread.start()
        return answer

    def end(self, *, shared: bool) -> None:
        """Steps down; without `shared`, nobody waits for what was read. Idempotent; does nothing when not elected."""
        if self._thread is None or self._stepped_down.is_set():
            return
        self._stepped_down.set()
        self._thread.join()
        try:
            self._client.end_storage_turn(
                self.source_id,
                self._worker_rank,
                self._worker_id,
                self._epoch,
                shared=shared,
                domain=self._domain,
            )
        except WireError as error:  # it expires by itself
            logger.info("the election to read storage expires by itself: %s", error)

    def _take(self, epoch: int) -> mx_pb2.TakeStorageTurnResponse:
        return self._client.take_storage_turn(
            self.source_id, self._worker_rank, self._worker_id, epoch, domain=self._domain
        )

    def _keep(self, pause: float) -> None:
        while not self._stepped_down.wait(pause):
            try:
                answer = self._take(self._epoch)
            except WireError as error:
                logger.info("the election to read storage was not renewed: %s", error)
                continue
            if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
                self._epoch = answer.epoch
