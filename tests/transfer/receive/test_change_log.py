"""Failures that are lines in the log."""

from __future__ import annotations

import logging

import pytest

from mxcore.transfer.receive import RecentErrors, logged
from mxserver.wire import ServerUnreachable

log = logging.getLogger("tests.errors")


def look(errors: RecentErrors, error: Exception | None = None) -> str:
    with errors:
        if error is not None:
            raise error
        return "there"
    return "nothing"


def test_what_is_polled_warns_once_until_it_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tests.errors")
    errors = RecentErrors(log, "nobody answers")
    away = ServerUnreachable("away")

    found = [look(errors, away), look(errors, away), look(errors), look(errors), look(errors, away)]

    assert found == ["nothing", "nothing", "there", "there", "nothing"]
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.DEBUG, logging.WARNING]
    assert all(line.startswith("nobody answers: ") for line in caplog.messages)


def test_other_errors_go_on_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    errors = RecentErrors(log, "nobody answers")
    assert look(errors, ServerUnreachable("away")) == "nothing"
    with pytest.raises(KeyError):
        look(errors, KeyError("a mistake"))
    assert look(errors, ServerUnreachable("away")) == "nothing"
    assert len(caplog.records) == 1


def test_a_step_that_fails_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with logged("closing"):
        raise OSError("no such file")
    assert caplog.messages == ["closing failed: no such file"]
