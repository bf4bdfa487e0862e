"""The order of the test folders: what is fast and finds most comes first, real engines come last.

What is marked `rdma` runs where TEST_RDMA names two RDMA ports: `make test-rdma` does, in a virtual machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import ends_with_pytest

# A loaded machine is no fault: by default an example that takes 0.2 s fails, and so does a second run that does not.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

FOLDERS = Path(__file__).parent
SLOW_ONES_LAST = ("models", "web", "security", "packaging", "transfer", "vllm")
MOST_WORKERS = 8


ends_with_pytest.begin()  # here: each process of xdist's reads this file, once


def _rank(item: pytest.Item) -> int:
    if not item.path.is_relative_to(FOLDERS):  # bench/micro
        return 0
    inside = item.path.relative_to(FOLDERS).parts
    return SLOW_ONES_LAST.index(inside[0]) + 1 if inside[0] in SLOW_ONES_LAST else 0


@pytest.hookimpl(optionalhook=True)  # a plain `pytest` needs no xdist
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than there are processors, since most tests wait for processes and sockets."""
    return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Workers' results come in any order: a line for each, with its file's name, would say little."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.getoption("numprocesses", None):
        reporter.showfspath = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts by folder; a stable sort, so that the order within a folder stays."""
    items.sort(key=_rank)
    if not os.environ.get("TEST_RDMA"):
        without_ports = [item for item in items if item.get_closest_marker("rdma")]
        items[:] = [item for item in items if item not in without_ports]
        config.hook.pytest_deselected(items=without_ports)
