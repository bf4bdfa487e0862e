"""Failures that are lines in the log: of a step, as leaving a fleet goes on whatever fails; of what is polled, once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from mxserver.wire.errors import MxError, WireError

__all__ = ["Trouble", "logged"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(step: str) -> Iterator[None]:
    """Errors of ours, the system's and gRPC's are logged with the step's name, and end it."""
    try:
        yield
    except (MxError, OSError, RuntimeError, ValueError) as error:
        logger.warning("%s failed: %s", step, error)


class Trouble:
    """Around what is asked again and again: an error of the wire ends the block and is logged.

    The first one is a warning, those after it are debug lines until the block goes well again. Thread-safe.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._is_told = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, WireError):
            self._log.log(logging.DEBUG if self._is_told else logging.WARNING, "%s: %s", self._what, error)
        if error is None or isinstance(error, WireError):
            self._is_told = error is not None
        return isinstance(error, WireError)
