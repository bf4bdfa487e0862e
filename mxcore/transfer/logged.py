"""A step whose failure is a line in the log: leaving a fleet goes on whatever fails on the way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from mxserver.wire.errors import MxError

__all__ = ["logged"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(step: str) -> Iterator[None]:
    """Errors of ours, the system's and gRPC's are logged with the step's name, and end it."""
    try:
        yield
    except (MxError, OSError, RuntimeError, ValueError) as error:
        logger.warning("%s failed: %s", step, error)
