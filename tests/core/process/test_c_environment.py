"""The C environment, changed beside threads that read it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mxcore.process import c_getenv, c_setenv

BESIDE_READERS = """
import ctypes, threading
from mxcore.process.c_environment import c_getenv, c_setenv

getenv = ctypes.CDLL(None).getenv  # without the GIL
getenv.restype = ctypes.c_char_p
ended = threading.Event()
read = []

def keep_reading(name):
    while not ended.is_set():
        for _ in range(1000):
            read.append(getenv(name))
        del read[:-10]

readers = [threading.Thread(target=keep_reading, args=(name,)) for name in (b"IS_NOT_THERE", b"MX_LAST")]
for reader in readers:
    reader.start()
for number in range(3000):
    c_setenv(f"MX_NAME_{number}", "x" * (number % 50))
    c_setenv("MX_LAST", str(number % 10))
    c_setenv("MX_IN_AND_OUT", None if number % 2 else "in")
ended.set()
for reader in readers:
    reader.join()
print(c_getenv("MX_NAME_2999"), c_getenv("MX_LAST"), c_getenv("MX_IN_AND_OUT"))
"""


def test_put_replaced_and_taken_out() -> None:
    assert c_getenv("MX_TEST_OF_ENVIRONMENT") is None
    c_setenv("MX_TEST_OF_ENVIRONMENT", None)  # is not there: nothing happens
    c_setenv("MX_TEST_OF_ENVIRONMENT", "eins")
    c_setenv("MX_TEST", "another whose name begins alike")
    assert c_getenv("MX_TEST_OF_ENVIRONMENT") == "eins"
    c_setenv("MX_TEST_OF_ENVIRONMENT", "")
    assert c_getenv("MX_TEST_OF_ENVIRONMENT") == ""
    c_setenv("MX_TEST_OF_ENVIRONMENT", None)
    assert c_getenv("MX_TEST_OF_ENVIRONMENT") is None
    c_setenv("MX_TEST_OF_ENVIRONMENT", "zwei \udcff")
    assert c_getenv("MX_TEST_OF_ENVIRONMENT") == "zwei \udcff"
    assert c_getenv("MX_TEST") == "another whose name begins alike"
    assert "MX_TEST_OF_ENVIRONMENT" not in os.environ
    for name in ("MX_TEST_OF_ENVIRONMENT", "MX_TEST"):
        c_setenv(name, None)


def test_it_goes_with_pythons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_TEST_OF_BOTH", "of the user")
    assert c_getenv("MX_TEST_OF_BOTH") == "of the user"
    c_setenv("MX_TEST_OF_BOTH", "ours")
    assert (c_getenv("MX_TEST_OF_BOTH"), os.environ["MX_TEST_OF_BOTH"]) == ("ours", "of the user")
    monkeypatch.setenv("MX_TEST_OF_BOTH", "of the user again")
    assert c_getenv("MX_TEST_OF_BOTH") == "of the user again"
    c_setenv("MX_TEST_OF_BOTH", None)
    monkeypatch.setenv("MX_TEST_OF_BOTH", "anew")
    assert c_getenv("MX_TEST_OF_BOTH") == "anew"
    monkeypatch.delenv("MX_TEST_OF_BOTH")
    assert c_getenv("MX_TEST_OF_BOTH") is None


def test_children_inherit_what_is_there_and_nothing_of_what_is_not() -> None:
    c_setenv("MX_TEST_OF_CHILD", "inherited")
    c_setenv("MX_TEST_OF_GONE", "x")
    c_setenv("MX_TEST_OF_GONE", None)
    asked = "import os; print(os.environ.get('MX_TEST_OF_CHILD'), os.environ.get('MX_TEST_OF_GONE'))"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["inherited", "None"]
    c_setenv("MX_TEST_OF_CHILD", None)


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0")])
def test_what_no_environment_can_hold(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="cannot be in an environment"):
        c_setenv(name, value)


def test_threads_that_read_meanwhile_come_to_no_harm() -> None:
    """The same by os.environ ended by SIGSEGV in four of five tries."""
    ran = subprocess.run([sys.executable, "-c", BESIDE_READERS], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["x" * 49, "9", "None"]
