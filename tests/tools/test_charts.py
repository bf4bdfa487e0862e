"""The README's charts are made of the results beside them, and no result is older than its chart."""

from __future__ import annotations

import json
import re

import pytest

from tests.transfer.conftest import ROOT
from tools import make_charts

NAMES = sorted(make_charts.CHARTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_chart_is_of_its_result(name: str) -> None:
    source = make_charts.FOLDER / f"{name}.json"
    assert f"made of {make_charts.digest(source)}" in (make_charts.FOLDER / f"{name}.svg").read_text(), "make charts"


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_how_it_was_measured(name: str) -> None:
    result = json.loads((make_charts.FOLDER / f"{name}.json").read_text())
    assert set(result["measured"]) == {"command", "date", "machine"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["measured"]["date"])


def test_the_readme_shows_pictures_that_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert {f"docs/figures/{name}.svg" for name in (*NAMES, "architecture")} <= set(pictures)
    for picture in pictures:
        assert (ROOT / picture).exists(), picture
