"""`make test` and `make test-engines`: every test is in one of them, parts are all of it, and workers end a run as one
process would. The commands are make's, run on a small suite with this project's configuration."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.transfer.conftest import ROOT

pytest_plugins = ["pytester"]

MARKED = """
import pytest

def test_plain(): pass

@pytest.mark.vllm
@pytest.mark.parametrize("number", range(3))
def test_engine(number): pass

@pytest.mark.rdma
def test_ports(): pass

@pytest.mark.rdma
@pytest.mark.vllm
def test_engine_on_ports(): pass
"""
WARNS = "import warnings\ndef test_it(): warnings.warn('about nothing')\ndef test_not_run(): pass\n"
HANGS = "import threading\ndef test_it(): threading.Event().wait()\ndef test_not_run(): pass\n"


@pytest.fixture(autouse=True)
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of tests with this project's configuration; nothing of an outer make or pytest in the environment."""
    for name in list(os.environ):
        if name.startswith(("MAKE", "MFLAGS", "PYTEST_XDIST", "ARGS", "PART", "TEST_RDMA")):
            monkeypatch.delenv(name)
    shutil.copy(ROOT / "pyproject.toml", pytester.path)
    (pytester.path / "tests").mkdir()
    for name in ("conftest.py", "ends_with_pytest.py"):
        shutil.copy(ROOT / "tests" / name, pytester.path / "tests")


def command(*words: str) -> list[str]:
    """What `make WORDS...` gives to Python."""
    said = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    program, *arguments = shlex.split(said.stdout.splitlines()[-1])
    assert program.endswith("/bin/python")
    return arguments


def collected(pytester: pytest.Pytester, *words: str) -> list[str]:
    """The tests that make's target runs."""
    _, module, *arguments = command(*words)
    assert module == "pytest"
    ran = pytester.inline_run(*arguments, "--collect-only", "-n0")
    return [item.nodeid for item in ran.getcalls("pytest_collection_finish")[-1].session.items]


def test_every_test_is_in_one_target(pytester: pytest.Pytester) -> None:
    """Those that need RDMA ports are in `make test-rdma`, which has the ports."""
    files = ["tests/test_a.py", "tests/test_b.py"]
    for file in files:
        (pytester.path / file).write_text(MARKED)
    engines = [f"{file}::test_engine[{number}]" for file in files for number in range(3)]
    assert collected(pytester, "test") == [f"{file}::test_plain" for file in files]
    assert collected(pytester, "test-engines") == engines
    parts = [collected(pytester, "test-engines", f"PART={part}/3") for part in (1, 2, 3)]
    assert all(parts)
    assert [name for part in parts for name in part] == engines


def test_workers_end_as_one_process_does(pytester: pytest.Pytester) -> None:
    """Warnings are errors, a hanging test ends, a run that takes too long ends and says so, failures are told first."""
    (pytester.path / "tests/test_a.py").write_text(WARNS)
    (pytester.path / "tests/test_b.py").write_text(HANGS)
    limits = ("-n2", "--timeout=0.5", "--session-timeout=1e-9")
    ran = subprocess.run([sys.executable, *command("test"), *limits], cwd=pytester.path, capture_output=True, text=True)
    assert ran.returncode == pytest.ExitCode.INTERRUPTED, ran.stderr
    failures, _, summary = ran.stdout.partition("slowest 15 durations")
    assert "UserWarning: about nothing" in failures
    assert "Timeout (>0.5s) from pytest-timeout" in failures
    assert "session-timeout: 1e-09 sec exceeded" in summary
    assert re.search(r"=== 2 failed in .* ===+$", summary.rstrip())
