"""docs/reference/api.md has the reference that the docstrings give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_docstrings_of_now() -> None:
    script = "from tools.make_api_doc import PAGE, with_reference; t = PAGE.read_text(); assert with_reference(t) == t"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "run: python tools/make_api_doc.py"
