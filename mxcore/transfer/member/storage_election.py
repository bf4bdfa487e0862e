"""This worker's turn to read storage for all that have the same weights and rank: taken, kept, ended."""

from __future__ import annotations

import logging
import threading

from mxserver.wire.calls.client import ServerClient
from mxserver.wire.errors import WireError
from mxserver.wire.proto import mx_pb2

__all__ = ["StorageTurn"]

logger = logging.getLogger(__name__)

_LEASE_FRACTION = 3  # renew at a third of the lease: two may get lost


class StorageTurn:
    """A turn under (source id, rank). While it is ours, a thread extends it; thread-safe.

    A turn that was lost while reading (the server was away for too long) changes nothing here: somebody else may then
    read storage as well.
    """

    def __init__(self, client: ServerClient, source_id: str, worker_rank: int, worker_id: str) -> None:
        self.source_id = source_id
        self._client = client
        self._worker_rank = worker_rank
        self._worker_id = worker_id
        self._epoch = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> mx_pb2.TakeStorageTurnResponse:
        """Asks for it; when it is ours, it stays ours until `end`. Raises WireError."""
        answer = self._client.take_storage_turn(self.source_id, self._worker_rank, self._worker_id)
        if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
            self._epoch = answer.epoch
            pause = answer.lease_ms / 1000 / _LEASE_FRACTION
            self._thread = threading.Thread(target=self._keep, args=(pause,), name="mx-storage-turn", daemon=True)
            self._thread.start()
        return answer

    def end(self, *, shared: bool) -> None:
        """Ends it; without `shared`, nobody waits for what was read. Idempotent; nothing when it is not ours."""
        if self._thread is None or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            self._client.end_storage_turn(
                self.source_id, self._worker_rank, self._worker_id, self._epoch, shared=shared
            )
        except WireError as error:  # it ends by itself
            logger.info("the turn to read storage ends by itself: %s", error)

    def _keep(self, pause: float) -> None:
        while not self._ended.wait(pause):
            try:
                answer = self._client.take_storage_turn(self.source_id, self._worker_rank, self._worker_id, self._epoch)
            except WireError as error:
                logger.info("the turn to read storage was not extended: %s", error)
                continue
            if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
                self._epoch = answer.epoch
