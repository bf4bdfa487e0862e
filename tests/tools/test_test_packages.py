"""What `make` installs on Debian and on Ubuntu, and which browser the page's tests take. No apt is run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.transfer.conftest import ROOT
from tests.web import browser

SCRIPT = ROOT / "tools" / "install_test_packages.sh"
MAKE_VENV = ROOT / "tools" / "make_venv.sh"
SNAP_STUB = "#!/bin/sh\nif ! [ -x /snap/bin/chromium.chromedriver ]; then exit 1; fi\n"  # as Ubuntu 24.04's begins


class Machine:
    """A PATH with the shell's tools, and with programs that say how they were called."""

    def __init__(self, folder: Path, distribution: str) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._release = folder / "os-release"
        self._release.write_text(f'NAME="{distribution}"\nID={distribution}\n')
        self._calls = folder / "calls"
        for name in ("sh", "grep", "mktemp", "tail"):
            (self.bin / name).symlink_to(shutil.which(name) or "")
        self.add("id", "#!/bin/sh\necho 0\n")
        self.add("apt-get", f'#!/bin/sh\necho "$@" >>{self._calls}\n')

    def add(self, name: str, text: str = "#!/bin/sh\n") -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def install(self, *pairs: str) -> tuple[list[str], str]:
        """The names that apt is told to install, and what is said."""
        ran = subprocess.run(
            ["sh", str(SCRIPT), *pairs],
            env={"PATH": str(self.bin), "OS_RELEASE": str(self._release)},
            capture_output=True,
            text=True,
            check=True,
        )
        calls = self._calls.read_text().splitlines() if self._calls.exists() else []
        names = [word for call in calls if call.startswith("install") for word in call.split()[1:]]
        return [name for name in names if not name.startswith("-")], ran.stderr


def test_debian_installs_what_is_missing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "debian")
    machine.add("prometheus")
    assert machine.install()[0] == ["chromium", "chromium-driver", "redis-server", "faketime"]


def test_nothing_is_asked_of_apt_where_all_is_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "debian")
    for name in ("chromium", "chromedriver", "prometheus", "redis-server", "faketime"):
        machine.add(name)
    assert machine.install() == ([], "")


def test_a_target_names_more(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "debian")
    for name in ("chromium", "chromedriver", "prometheus", "redis-server", "faketime"):
        machine.add(name)
    assert machine.install("sshd:openssh-server")[0] == ["openssh-server"]


def test_ubuntu_installs_no_snap_and_says_so(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "ubuntu")
    names, said = machine.install()
    assert names == ["prometheus", "redis-server", "faketime"]
    assert "tests of the status page skip without google-chrome and chromedriver" in said
    for name in ("google-chrome", "chromedriver"):
        machine.add(name)
    assert "skip" not in machine.install()[1]


def test_a_snap_is_no_browser_for_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, "ubuntu")
    monkeypatch.setenv("PATH", str(machine.bin))
    for name in ("chromium", "chromedriver"):
        machine.add(name, SNAP_STUB)
    with pytest.raises(pytest.skip.Exception, match="on Ubuntu, where they are a snap"):
        browser.require_browser()
    machine.add("google-chrome")
    machine.add("chromedriver")
    assert browser.require_browser() == tuple(str(machine.bin / name) for name in ("google-chrome", "chromedriver"))


def test_a_python_that_is_too_old_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3.10\n')  # Ubuntu 22.04's
    python.chmod(0o755)
    ran = subprocess.run(
        ["sh", str(MAKE_VENV), str(tmp_path / "venv"), str(tmp_path / "requirements.txt")],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"{python} is Python 3.10; 3.11 to 3.13 is needed" in ran.stderr
    assert not (tmp_path / "venv").exists()
