"""Errors that are logged instead of raised: of a step of shutting down, and of calls that are repeated."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from mxserver.wire import MxError, WireError

__all__ = ["RecentErrors", "logged"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(step: str) -> Iterator[None]:
    """Around a step that may fail: MxError, OSError, RuntimeError and ValueError are logged with the step's name."""
    try:
        yield
    except (MxError, OSError, RuntimeError, ValueError) as error:
        logger.warning("%s failed: %s", step, error)


class RecentErrors:
    """Around a call that is repeated: a WireError ends the block and is logged.

    The first is a warning; those after it are debug lines until the block succeeds again. Thread-safe.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._is_warned = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, WireError):
            self._log.log(logging.DEBUG if self._is_warned else logging.WARNING, "%s: %s", self._what, error)
        if error is None or isinstance(error, WireError):
            self._is_warned = error is not None
        return isinstance(error, WireError)
