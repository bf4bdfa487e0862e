"""Tests that docs/explanation/threat-model.md names as proof are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_proof_is_a_test() -> None:
    text = (ROOT / "docs" / "explanation" / "threat-model.md").read_text()
    file, named = "", 0
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", text):
        file = path or file
        if not file or not (path or test):
            continue
        source = (ROOT / file).read_text()
        assert not test or f"def {test}(" in source, f"{file} has no {test}"
        named += 1
    assert named > 20
