"""A real server for the workers of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mxbench.demo.workers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Server(tmp_path_factory.mktemp("server"))
    try:
        yield process.start()
    finally:
        process.child.stop()
