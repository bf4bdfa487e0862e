"""The wait of a worker for one that reads storage for all."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from mxcore.transfer.member.watched_sources import WatchedSources
from mxcore.transfer.move import Source
from mxserver.wire import ServerRefused, WireError
from mxserver.wire.proto import mx_pb2

__all__ = ["wait_for_source"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_SERVER_AWAY_SECONDS = 15.0  # then weights come from storage


def wait_for_source(
    listed: Callable[[list[Source] | None], list[Source]],
    stand_for_election: Callable[[], mx_pb2.TakeStorageTurnResponse | None],
    *,
    wait_seconds: float,
    known: Callable[[], bool],
    leaving: threading.Event,
    stopped: Callable[[], bool],
    watched: WatchedSources | None = None,
) -> list[Source]:
    """What is `listed` once one of them is complete; empty: read storage now. `listed` takes what was told, if it was.

    `stand_for_election` answers None to whoever is to read storage. Both may raise WireError: a server that this worker
    is `known` to, or that has answered here, is waited for; another is not. Ends early, with nothing, when `leaving` is
    set or `stopped()` says so. While `watched` is told, nothing is asked but for the turn, and that when it says so.
    """
    if watched is not None:
        watched.wait_for_first(lambda: leaving.is_set() or stopped())
    began = heard = time.monotonic()
    told = away = False
    while not leaving.is_set() and not stopped():
        pause = _FIRST_RETRY_SECONDS
        try:
            found = listed(watched.holders() if watched is not None and watched.is_told else None)
            if any(not source.receiving for source in found):
                return found
            reader = watched.reader if watched is not None else ""
            if watched is None or watched.may_ask_for_turn():
                answer = stand_for_election()
                if answer is None:
                    return []
                # A round is three calls where nothing is told.
                pause = answer.retry_ms / 1000 * random.uniform(1, 3)  # noqa: S311 - no secret
                reader = answer.reader_worker_id
            heard = time.monotonic()
        except WireError as error:  # others may have the weights all the same
            silent = time.monotonic() - heard > _SERVER_AWAY_SECONDS
            if isinstance(error, ServerRefused) or not (told or known()) or silent:
                logger.warning("nobody can be waited for, weights come from storage: %s", error)
                return []
            if not away:
                logger.warning("the server is waited for, at most %g s: %s", _SERVER_AWAY_SECONDS, error)
            away = True
        else:
            away = False
            if not told:
                logger.info("worker %s reads the weights from storage: waiting", reader or "another")
            told = True
        if time.monotonic() - began > wait_seconds:
            logger.warning(
                "nobody had the weights within %g s (MX_SOURCE_WAIT_SECS): they come from storage", wait_seconds
            )
            return []
        if watched is not None and watched.is_told:
            watched.wait(pause)
        else:
            leaving.wait(pause)
    return []
