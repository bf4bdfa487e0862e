"""Writes the tables of metrics in docs/reference/metrics.md out of mxserver/telemetry and mxcore/metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxcore.metrics import EXPORTED, FAMILIES, Family  # noqa: E402 - of this checkout
from mxserver.telemetry import DEFINITIONS, MODEL_DEFINITIONS, Definition  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "metrics.md"
END = "<!-- end -->"
TABLES = {
    "<!-- metrics:": DEFINITIONS,
    "<!-- metrics of models -->": MODEL_DEFINITIONS,
    "<!-- metrics of workers -->": (*FAMILIES, *EXPORTED),
}


def table(definitions: Iterable[Definition | Family]) -> str:
    """One row a metric."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for definition in definitions:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        rows.append(f"| `{definition.name}` | {definition.kind} | {labels} | {definition.meaning} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the tables of now, each between its two marks."""
    for mark, definitions in TABLES.items():
        begin = page.index("\n", page.index(mark)) + 1
        page = page[:begin] + table(definitions) + page[page.index(END, begin) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
