"""docs/tutorial/two-workers.md, word for word."""

from __future__ import annotations

import re
import shutil

import pytest

from tests import doc_pages
from tests.transfer.conftest import ROOT

pytestmark = pytest.mark.vllm


def test_the_tutorial_does_what_it_says() -> None:
    shutil.rmtree(ROOT / "build" / "tutorial", ignore_errors=True)
    done = doc_pages.run(ROOT / "docs" / "tutorial" / "two-workers.md", ROOT, seconds=540)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    paths = re.findall(r" rank 0: (storage|p2p)\b", done.stdout)
    assert paths == ["storage", "p2p"]
    assert done.stdout.splitlines().count("equal") == 2
    assert "<Fetched 'tutorial' version 1: 8 tensors" in done.stdout
    assert not (ROOT / "build" / "tutorial").exists()
