"""The server's log: one line an event on stderr, `time LEVEL logger event key=value …`."""

from __future__ import annotations

import logging
import time

LEVELS = {
    "trace": logging.DEBUG,  # existing deployments have it in MODEL_EXPRESS_LOG_LEVEL
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class LineFormatter(logging.Formatter):
    """UTC with milliseconds; line breaks in values are escaped, so that no client can write a line of its own."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


def set_up(level: str) -> None:
    """Sends all logs of this process to stderr. `level` is one of `LEVELS`."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
