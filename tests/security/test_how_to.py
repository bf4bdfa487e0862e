"""docs/how-to/tls-and-tokens.md, word for word."""

from __future__ import annotations

from pathlib import Path

from tests import doc_pages
from tests.transfer.conftest import ROOT


def test_a_server_with_a_certificate_and_tokens_as_the_page_makes_it(tmp_path: Path) -> None:
    done = doc_pages.run(ROOT / "docs" / "how-to" / "tls-and-tokens.md", tmp_path, seconds=90)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "the settings are good" in done.stdout + done.stderr
    log = (tmp_path / "tls" / "server.log").read_text()
    assert "NOT PROTECTED" not in log
    assert done.stderr.count("MX_UNAUTHENTICATED") == 1, "without a token"
    assert done.stderr.count("needs admin [MX_ACCESS]") == 1, "a reader may not remove models"
