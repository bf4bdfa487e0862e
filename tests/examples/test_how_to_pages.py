"""Every block of shell commands in a tutorial or a how-to is run by a test, or says by which one, or why by none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import doc_pages
from tests.transfer.conftest import ROOT

PAGES = [ROOT / "docs" / "tutorial" / "two-workers.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
WORD_FOR_WORD = {
    "two-workers.md": "tests/vllm/test_tutorial.py",
    "tls-and-tokens.md": "tests/security/test_how_to.py",
    "signing.md": "tests/storage/signed/test_signing_page.py",
    "kubernetes.md": "tests/deploy/test_kubernetes_page.py",
    "run-a-server.md": "tests/deploy/test_kubernetes_page.py",
    "migrate.md": "tests/deploy/test_kubernetes_page.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_is_run_or_says_why_not(page: Path) -> None:
    for block in doc_pages.blocks(page):
        if (why := doc_pages.left_out(block)) is None:
            assert page.name in WORD_FOR_WORD, f"nobody runs this:\n{block}"
        elif why["test"]:
            assert (ROOT / why["test"]).exists(), why["test"]


@pytest.mark.parametrize(("page", "test"), WORD_FOR_WORD.items())
def test_pages_that_are_run_have_their_test(page: str, test: str) -> None:
    assert page in (ROOT / test).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands_stand_in_blocks_that_are_looked_at(page: Path) -> None:
    fences = [line.strip() for line in page.read_text().splitlines() if line.strip().startswith("```")]
    assert set(fences) <= {"```", "```sh", "```toml", "```yaml", "```python"}
