"""A bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import pty
import struct
import termios

import pytest

from mxcore.storage.plan import ProgressDisplay


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    out = io.StringIO()
    with caplog.at_level(logging.INFO), ProgressDisplay("Loading", file=out, clock=lambda: now[0]) as display:
        for seconds, done_bytes in ((1.0, 10**9), (10.0, 10**10), (12.0, 2 * 10**10), (21.0, 10**11)):
            now[0] = seconds
            display(done_bytes, 10**11)
    assert [record.message for record in caplog.records] == [
        "Loading: 10%, 10.0 of 100.0 GB, 1.00 GB/s",
        "Loading: 100%, 100.0 of 100.0 GB, 4.76 GB/s",
    ]
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as screen:
        with os.fdopen(theirs, "w") as terminal, ProgressDisplay("Loading", file=terminal) as display:
            display(10**9, 2 * 10**9)
            display(2 * 10**9, 2 * 10**9)
        shown = ""
        with contextlib.suppress(OSError):  # EIO: nothing is left, and nobody there
            while part := screen.read(65536):
                shown += part.decode()
    assert "Loading" in shown
    assert "2.00G" in shown
    assert not caplog.records
