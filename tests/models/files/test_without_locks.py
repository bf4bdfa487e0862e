"""Where `flock` grants each lock without holding it, or says ENOSYS, as some mounts do: under a library of C."""

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


def test_fetches_at_once_to_one_hub_cache(warm_server: str, without_locks: dict[str, str], tmp_path: Path) -> None:
    both = [started(FETCH, warm_server, REPOSITORY, str(tmp_path), env=without_locks) for _ in range(2)]
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
    assert list((snapshot.parent.parent / ".mx-partial").iterdir()) == []
