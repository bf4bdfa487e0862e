"""The ceiling, and what a cgroup of either version leaves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mxcore.errors import HostMemoryLimit
from mxcore.storage.plan import MemoryBudget, budget, parse_bytes
from mxcore.storage.plan.memory_limit import _from_environment, available_bytes

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("8GiB", 8 * GIB),
        ("500MB", 500_000_000),
        ("1.5 GiB", GIB * 3 // 2),
        ("64k", 64_000),
        ("2tib", 2 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "8 apples", "1e9", "iB", "1iB", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": cgroup,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def test_without_a_cgroup_it_is_the_machine(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, "0::/\n", {})) == 8 * GIB
    assert available_bytes(tmp_path / "nowhere") > 0


def test_version_2_takes_the_tightest_group_above(tmp_path: Path) -> None:
    files = {
        "pod/memory.max": f"{2 * GIB}\n",
        "pod/memory.current": f"{GIB}\n",
        "pod/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        "pod/box/memory.max": "max\n",
        "pod/box/memory.current": "5\n",
    }
    assert available_bytes(machine(tmp_path, "0::/pod/box\n", files)) == GIB * 3 // 2


def test_version_2_within_a_container(tmp_path: Path) -> None:
    """There the own group is the mount's root, whatever the path says."""
    files = {"memory.max": f"{GIB}\n", "memory.current": "0\n"}
    assert available_bytes(machine(tmp_path, "0::/../../elsewhere\n", files)) == GIB


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
        "memory/job/memory.usage_in_bytes": f"{GIB}\n",
        "memory/job/memory.stat": f"total_inactive_file {GIB // 4}\n",
    }
    assert available_bytes(machine(tmp_path, "4:cpu,memory:/job\n2:pids:/job\n", files)) == 2 * GIB + GIB // 4


def test_more_than_the_limit_is_never_negative(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, "0::/\n", {"memory.max": "5\n", "memory.current": "9\n"})) == 0


def test_a_budget_counts(caplog: pytest.LogCaptureFixture) -> None:
    held = MemoryBudget(100, "MX_HOST_MEMORY_LIMIT")
    with held.held(60, "a ring"):
        assert (held.held_bytes, held.free_bytes) == (60, 40)
        with pytest.raises(HostMemoryLimit, match=r"an arena wants 41 bytes.*60 are held.*limit is 100"):
            held.take(41, "an arena")
        held.set_limit(200, "a setting")
        held.take(41, "an arena")
        held.give_back(41)
    assert held.held_bytes == 0


def test_where_the_limit_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    assert _from_environment({"MX_HOST_MEMORY_LIMIT": "1GiB"}).limit_bytes == GIB
    assert _from_environment({}).limit_bytes >= 64 << 20
    with caplog.at_level(logging.WARNING):
        assert _from_environment({"MX_HOST_MEMORY_LIMIT": "lots"}).origin.startswith("a quarter")
    assert "'lots' is no size" in caplog.text
    assert budget() is budget()
