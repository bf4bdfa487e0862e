"""Replicas of several users over one folder: modes, groups, and files of others that cannot be linked."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.models import CacheSettings, OpenCache, model_name
from mxserver.models.cache_layout import CacheLayout
from mxserver.wire.proto import model_pb2
from tests.models.cache.test_lease import as_another_user

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

GROUP = 20_003
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 5000}


@pytest.fixture
def shared() -> Iterator[Path]:
    """Not below pytest's own folder: each session of pytest on this machine closes that to other users again."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        source = folder / "sources" / "model"
        source.mkdir(parents=True)
        for name, data in FILES.items():
            (source / name).write_bytes(data)
        yield folder


def get(folder: Path) -> None:
    """Has a cache in this process get the model."""
    opened = OpenCache(CacheSettings(folder / "cache", file_sources=(folder / "sources",)), lambda _: None)
    try:
        model = model_name(model_pb2.FILE, f"file://{folder / 'sources' / 'model'}")
        job = opened.downloads.ensure(model, "")
        seen = 0
        while not (state := job.wait_for_change(seen, 60)).ended:
            seen = state.version
        assert state.phase == "done", state
    finally:
        opened.close()


def test_setgid_folders_keep_group_and_modes(shared: Path) -> None:
    """What one replica makes, the others of its group can write: folders and files, as umask 002 says."""
    cache = shared / "cache"
    cache.mkdir()
    os.chown(cache, 0, GROUP)
    cache.chmod(0o2775)
    before = os.umask(0o002)
    try:
        get(shared)
    finally:
        os.umask(before)
    made = list(cache.rglob("*"))
    assert len(made) > 8
    for path in made:
        found = path.lstat()
        assert found.st_gid == GROUP, path
        if stat.S_ISDIR(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == 0o2775, path
        elif stat.S_ISREG(found.st_mode):
            locks = path.parent.name == "leases"  # empty, and of servers of any user
            assert stat.S_IMODE(found.st_mode) == (0o666 if locks else 0o664), path


def test_files_of_another_user_are_copied(shared: Path) -> None:
    """fs.protected_hardlinks forbids to link what one may only read; once copied, it is one's own."""
    get(shared)  # as root; also imports all, which the other user cannot read
    cache = shared / "cache"
    for path in cache.rglob("*"):
        if path.is_dir():
            path.chmod(0o777)
    cache.chmod(0o777)
    for record in CacheLayout(cache).records.iterdir():
        record.unlink()
    told: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    def again() -> None:
        logger = logging.getLogger("mxserver.models.transfer")
        logger.addHandler(Told())
        logger.setLevel(logging.INFO)
        get(shared)
        copied = [line for line in told if "copied, since it cannot be linked" in line]
        assert len(copied) == len(FILES), told

    if Path("/proc/sys/fs/protected_hardlinks").read_text().strip() != "1":
        pytest.skip("this machine lets everybody link everything")
    assert as_another_user(again) == 0


def test_no_entry_and_no_home_are_a_line() -> None:
    """A user id without a name, as containers of OpenShift have: no traceback."""
    code = """
import encodings.idna, logging, os, sys
import mxserver.config_file, mxserver.logs, mxserver.server, mxserver.settings  # which the other user cannot read
from mxserver.cli import main
os.setgroups([]); os.setgid(20002); os.setuid(20002)
for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
sys.argv = ["mxserver", "--host", "127.0.0.1", "--port", "0"]
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode not in (0, 2)
    assert "Traceback" not in ended.stderr
    assert "/.local/state/mxserver" in ended.stderr
