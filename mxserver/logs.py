"""The server's log: one line an event on stderr, `time LEVEL logger event key=value …`, or the same as JSON objects."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

LEVELS = {
    "trace": logging.DEBUG,  # existing deployments have it in MODEL_EXPRESS_LOG_LEVEL
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class LineFormatter(logging.Formatter):
    """UTC with milliseconds. Line breaks in values are escaped, so that a client cannot forge log lines."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


# `key=%s` in a message's template; the value may have several conversions (`pod=%s/%s`).
_FIELD = re.compile(r"(\w+)=([^\s;,]*%[^\s;,]*)")
_CONVERSION = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?[a-zA-Z]")


class JsonFormatter(LineFormatter):
    """One object a line: time, level, logger, event, message, and the event's own fields under `fields`.

    The fields are those of the template, `published source=%s rank=%d`, with numbers as numbers.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            **_event(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _event(record: logging.LogRecord) -> dict[str, Any]:
    message = record.getMessage()
    template = str(record.msg)
    if not isinstance(record.args, tuple) or len(_CONVERSION.findall(template)) != len(record.args):
        return {"event": message, "message": message}
    fields: dict[str, Any] = {}
    for match in _FIELD.finditer(template):
        first = len(_CONVERSION.findall(template[: match.start()]))
        conversions = _CONVERSION.findall(match[2])
        values = record.args[first : first + len(conversions)]
        whole = len(conversions) == 1 and conversions[0] == match[2] and isinstance(values[0], int | float)
        fields[match[1]] = values[0] if whole else match[2] % values
    event = _FIELD.split(template, maxsplit=1)[0].strip() if fields else message
    if _CONVERSION.search(event):
        event = message
    return {"event": event, "message": message} | ({"fields": fields} if fields else {})


def set_up(level: str, log_format: str = "text") -> None:
    """Sends all logs of this process to stderr. `level` is one of `LEVELS`, `log_format` text or json."""
    handler = logging.StreamHandler()
    text = LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
