"""Where `flock` grants each lock without holding it, or says ENOSYS, as some mounts do: under a library of C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.conftest import FILE_DIGESTS, REPOSITORY, files_below

SOURCE = """
#include <errno.h>
int flock(int handle, int operation) {
#ifdef NONE
    errno = ENOSYS;
    return -1;
#else
    return 0;
#endif
}
"""
KEY = "0" * 32
OWNER = f"""
import sys
from pathlib import Path
from mxserver.models.cache.lease import LeaseFolder
folder = LeaseFolder(Path(sys.argv[1]), 600.0)
assert folder.try_acquire("{KEY}")
print("held", flush=True)
sys.stdin.readline()
"""
OTHER = f"""
import os, sys
from pathlib import Path
from mxserver.models.cache.lease import LeaseFolder
folder = LeaseFolder(Path(sys.argv[1]), 600.0)
assert folder.try_acquire("{KEY}") is None, "a living owner was taken for dead"
assert folder.is_leased("{KEY}")
os.utime(Path(sys.argv[1], "leases", "{KEY}.1"), (0, 0))
assert folder.try_acquire("{KEY}").generation == 2
folder.close()
"""
FETCH = """
import sys
from pathlib import Path
from mxserver.wire.files import ModelClient
address, name, cache = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with ModelClient(address) as client:
    print(client.fetch_to_hub_cache(name, Path(cache)).name)
"""


@pytest.fixture(scope="module", params=["grants", "none"])
def without_locks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes without locks."""
    folder = tmp_path_factory.mktemp("flock")
    (folder / "flock.c").write_text(SOURCE)
    kind = ["-DNONE"] if request.param == "none" else []
    subprocess.run(["cc", "-shared", "-fPIC", *kind, "-o", "flock.so", "flock.c"], cwd=folder, check=True)
    return {**os.environ, "LD_PRELOAD": str(folder / "flock.so")}


def started(code: str, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert made.stdout is not None
    assert made.stdout.readline() in ("held\n", "ready\n")
    return made


def test_a_lease_goes_by_its_age(without_locks: dict[str, str], tmp_path: Path) -> None:
    owner = started(OWNER, str(tmp_path), env=without_locks)
    subprocess.run([sys.executable, "-c", OTHER, str(tmp_path)], env=without_locks, check=True)
    owner.communicate("\n", 120)
    assert owner.returncode == 0


def test_fetches_at_once_to_one_hub_cache(warm_server: str, without_locks: dict[str, str], tmp_path: Path) -> None:
    both = [started(FETCH, warm_server, REPOSITORY, str(tmp_path), env=without_locks) for _ in range(2)]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    commits = {one.communicate(timeout=120)[0].strip() for one in both}
    assert [one.returncode for one in both] == [0, 0]
    (snapshot,) = (tmp_path / "models--org--tiny-1.0" / "snapshots").iterdir()
    assert commits == {snapshot.name}
    assert files_below(snapshot) == FILE_DIGESTS
    assert list((snapshot.parent.parent / ".mx-partial").iterdir()) == []
