"""Serves what a receive has verified so far."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mxcore.transfer.receive import Content
from mxcore.transfer.serve.holder import Holder
from mxserver.wire import MxError

__all__ = ["ServedRelay"]

logger = logging.getLogger(__name__)


class ServedRelay:
    """The receiver's relay: `start` makes an empty holder of a content, which then grows. For one thread at a time."""

    def __init__(self, start: Callable[[Content], Holder]) -> None:
        self._start = start
        self._holder: Holder | None = None

    def begin(self, content: Content) -> None:
        """Starts serving, with no chunks yet; on a failure only the relay does without it."""
        self._holder = None
        try:
            self._holder = self._start(content)
        except MxError as error:
            logger.warning("this worker does not serve while it receives: %s", error)

    def update(self, verified: int) -> None:
        """Sets which chunks are verified."""
        if self._holder is not None:
            self._holder.update(verified)
