"""docs/errors.md has every code, once, with what to do."""

from __future__ import annotations

import subprocess
import sys

from tests.server.conftest import ROOT

PRINT = "import sys; sys.path.insert(0, 'tools'); import make_errors_doc; sys.stdout.write(make_errors_doc.page())"


def test_page_is_what_the_generator_makes() -> None:
    """Which ends for a code without advice."""
    run = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=ROOT)
    page = (ROOT / "docs" / "errors.md").read_text()
    assert page == run.stdout, "run: python tools/make_errors_doc.py"
    codes = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `MX_")]
    assert len(codes) == len(set(codes)) > 100
