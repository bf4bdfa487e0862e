"""The log as JSON: one object a line, fields as values."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable

import pytest

from mxserver.logs import JsonFormatter
from tests.web.conftest import WebServer


def line(template: str, *arguments: object) -> dict[str, object]:
    record = logging.LogRecord("mxserver.x", logging.INFO, "", 0, template, arguments, None)
    parsed: dict[str, object] = json.loads(JsonFormatter().format(record))
    return parsed


def test_fields_of_the_template() -> None:
    parsed = line("published source=%s rank=%d load=%.1f pod=%s/%s", "abc", 3, 0.25, "ns", "pod-1")
    assert parsed["event"] == "published"
    assert parsed["fields"] == {"source": "abc", "rank": 3, "load": 0.25, "pod": "ns/pod-1"}
    assert parsed["message"] == "published source=abc rank=3 load=0.2 pod=ns/pod-1"
    assert (parsed["level"], parsed["logger"]) == ("INFO", "mxserver.x")


@pytest.mark.parametrize(
    ("template", "arguments", "event"),
    [
        ("plain", (), "plain"),
        ("100 %% of %s", ("x",), "100 % of x"),
        ("was stopped seconds=%.1f; more", (1.5,), "was stopped"),
    ],
)
def test_other_templates(template: str, arguments: tuple[object, ...], event: str) -> None:
    assert line(template, *arguments)["event"] == event


def test_line_breaks_and_exceptions_stay_in_one_line() -> None:
    try:
        raise ValueError("x\ny")
    except ValueError:
        record = logging.LogRecord("m", logging.ERROR, "", 0, "a\nb %s", ("c\nd",), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: x" in json.loads(text)["exception"]


def test_server_logs_json(start_web: Callable[..., WebServer]) -> None:
    web = start_web("--log-format", "json")
    parsed = [json.loads(one) for one in web.lines]
    assert any(one["message"].startswith("listening on") and one["fields"]["store"] for one in parsed)


def test_bad_format_is_refused(start_web: Callable[..., WebServer]) -> None:
    with pytest.raises(AssertionError, match="--log-format 'xml' is refused: it must be text or json"):
        start_web("--log-format", "xml")
