"""The order of the test folders: what is fast and finds most comes first, real engines come last."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDERS = Path(__file__).parent
SLOW_ONES_LAST = ("models", "web", "security", "packaging", "transfer", "vllm")


def _rank(item: pytest.Item) -> int:
    inside = item.path.relative_to(FOLDERS).parts
    return SLOW_ONES_LAST.index(inside[0]) + 1 if inside[0] in SLOW_ONES_LAST else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder; a stable sort, so that the order within a folder stays."""
    items.sort(key=_rank)
