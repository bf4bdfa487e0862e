"""What tests start does not outlive a pytest that is killed."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from tests import ends_with_pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import subprocess, sys
from tests import ends_with_pytest
ends_with_pytest.begin()
started = subprocess.Popen(["sleep", "3600"], start_new_session=True)
print(started.pid, flush=True)
sys.stdin.read()
"""


def test_what_was_started_ends_with_whoever_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        watched = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([watched], [], [], 120)
    os.close(watched)
    assert ended


def test_this_pytest_is_such_a_one() -> None:
    mark = os.environ[ends_with_pytest.MARK]
    assert mark.startswith(f"{os.getpid()}-")
    with subprocess.Popen(["sleep", "3600"]) as started:
        assert started.pid in ends_with_pytest.marked(mark)
        started.kill()
