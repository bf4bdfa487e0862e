"""docs/reference/errors.md, and what the server answers at /errors, have every code, once, with what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from mxserver.telemetry import DOUBTS, REASONS
from mxserver.web import status
from tests.server.conftest import ROOT

PRINT = (
    "import json, sys; sys.path.insert(0, 'tools'); import make_errors_doc as made; "
    "json.dump([made.page(), made.served_page()], sys.stdout)"
)


def test_pages_are_what_the_generator_makes() -> None:
    """Which ends for a code without advice."""
    run = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=ROOT)
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    served = (ROOT / "mxserver" / "web" / "assets" / "errors.html").read_text()
    assert [page, served] == json.loads(run.stdout), "run: python tools/make_errors_doc.py"
    codes = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `MX_")]
    assert len(codes) == len(set(codes)) > 100
    assert re.findall(r'<dt id="(\w+)">', served) == codes


def test_reasons_of_refusals_and_doubts_lead_to_a_code() -> None:
    served = (ROOT / "mxserver" / "web" / "assets" / "errors.html").read_text()
    linked = {status._code(reason) for reason in REASONS.values() if reason != "other"}
    linked |= {status._DOUBT_CODES[kind] for kind in DOUBTS}
    assert {code for code in linked if f'id="{code}"' not in served} == set()
    assert status._code("other") == ""
