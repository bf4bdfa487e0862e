"""Where `flock` grants each lock without holding it, says ENOSYS, or holds on one host alone, as on some mounts: under
a library of C."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.conftest import FILE_DIGESTS, REPOSITORY, files_below
from tests.server.redis_process import RedisProcess, shared_redis

SOURCE = """
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_locked[4096];

/* Among the files that this process has open: each process is a host, whose locks the others do not see. */
static int held_here(int handle, int operation) {
    struct stat mine, other;
    if (handle >= 4096 || fstat(handle, &mine)) return -1;
    is_locked[handle] = 0;
    for (int at = 0; at < 4096; at++)
        if (is_locked[at] && !fstat(at, &other) && other.st_ino == mine.st_ino && other.st_dev == mine.st_dev) {
            errno = EWOULDBLOCK;
            return -1;
        }
    is_locked[handle] = !(operation & LOCK_UN);
    return 0;
}

int flock(int handle, int operation) {
    const char *kind = getenv("LOCKS");
    errno = ENOSYS;
    return kind[0] == 'g' ? 0 : kind[0] == 'n' ? -1 : held_here(handle, operation);
}
"""
KEY = "0" * 32
HOLDER = f"""
import logging, sys
from pathlib import Path
from mxserver.models.cache.lease import LeaseFolder
from mxserver.store.redis import RedisLocks
logging.basicConfig(stream=sys.stderr)
url = sys.argv[2]
folder = LeaseFolder(Path(sys.argv[1]), 600.0, RedisLocks(url, sys.argv[1]) if url else None)
print("held" if folder.try_acquire("{KEY}") else "not held", flush=True)
sys.stdin.readline()
folder.close()
"""
FETCH = """
import os, sys
from pathlib import Path
from mxserver.wire.files import ModelClient, model_client
address, name, cache = sys.argv[1:]
if host := os.environ["HOST"]:
    model_client.host_id = lambda: host * 32
print("ready", flush=True)
sys.stdin.readline()
with ModelClient(address) as client:
    print(client.fetch_to_hub_cache(name, Path(cache)).name)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flock")
    (folder / "flock.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", "flock.so", "flock.c"], cwd=folder, check=True)
    return folder / "flock.so"


@pytest.fixture(params=["grants", "none"])
def without_locks(request: pytest.FixtureRequest, library: Path) -> dict[str, str]:
    """The environment of processes without locks."""
    return {**os.environ, "LD_PRELOAD": str(library), "LOCKS": request.param}


def started(code: str, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize(("url", "second"), [("", "held\n"), (shared_redis, "not held\n")], ids=["alone", "Redis"])
def test_servers_that_share_redis_need_no_locks_and_others_say_so(
    without_locks: dict[str, str], tmp_path: Path, url: str | Callable[[], RedisProcess], second: str
) -> None:
    place = url if isinstance(url, str) else url().url
    both = []
    for expected in ("held\n", second):
        both.append(started(HOLDER, str(tmp_path), place, env=without_locks))
        assert said(both[-1]) == expected
    for one in both:
        errors = one.communicate("\n", 120)[1]
        assert one.returncode == 0
        assert ("no other server may use it, unless all share Redis" in errors) is (place == "")


@pytest.mark.parametrize("locks", ["grants", "none", "on one host"])
def test_fetches_at_once_to_one_hub_cache(warm_server: str, library: Path, tmp_path: Path, locks: str) -> None:
    """Two pods on a volume whose mount keeps locks to itself look as if locks held."""
    both = []
    for host in "ab":
        names = {"LD_PRELOAD": str(library), "LOCKS": locks, "HOST": host if locks == "on one host" else ""}
        both.append(started(FETCH, warm_server, REPOSITORY, str(tmp_path), env=os.environ | names))
    assert [said(one) for one in both] == ["ready\n", "ready\n"]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    commits = {one.communicate(timeout=120)[0].strip() for one in both}
    assert [one.returncode for one in both] == [0, 0]
    (snapshot,) = (tmp_path / "models--org--tiny-1.0" / "snapshots").iterdir()
    assert commits == {snapshot.name}
    assert files_below(snapshot) == FILE_DIGESTS
    left = [path.name for path in (snapshot.parent.parent / ".mx-partial").rglob("*") if path.is_file()]
    assert left == (["lock", "lock"] if locks == "on one host" else [])
