"""The services of a worker that serves, listening where others reach it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mxcore.settings import OwnAddress, WorkerSettings
from mxcore.transfer.route import UcxPolicy
from mxcore.transfer.serve import WorkerIdentity, WorkerServer

__all__ = ["listening"]

logger = logging.getLogger(__name__)


def listening(
    settings: WorkerSettings,
    address: OwnAddress,
    who: WorkerIdentity,
    policy: UcxPolicy,
    doubted: Callable[[Sequence[int]], None],
) -> WorkerServer:
    """The services of the holder of `who`, at `address` and the rank's ports; everywhere, where that is a guess.

    `doubted` hears of chunks that readers refused. Raises SettingError.
    """
    if address.guessed:
        logger.warning(
            "there is no way to %s yet: this worker listens everywhere and advertises %s until there is one "
            "(MX_WORKER_HOST says it once and for all)",
            settings.server_address,
            address.host,
        )
    rank = who.worker_rank
    return WorkerServer(
        who.holder,
        policy,
        source_id=who.source_id,
        worker_id=who.worker_id,
        worker_rank=rank,
        accelerator=who.accelerator,
        host=address.host,
        port=settings.worker_grpc_port + rank if settings.worker_grpc_port else 0,
        chunk_port=settings.worker_chunk_port + rank if settings.worker_chunk_port else 0,
        loopback=address.is_loopback,
        doubted=doubted,
        chunk_tls=settings.chunk_tls != "off",
    )
