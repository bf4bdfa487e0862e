"""Writes the table of metrics in docs/operations.md out of mxserver/telemetry/metrics.py."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxserver.telemetry import DEFINITIONS  # noqa: E402 - of this checkout

PAGE = ROOT / "docs" / "operations.md"
BEGIN = "<!-- metrics:"
END = "<!-- end -->"


def table() -> str:
    """One row a metric."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for definition in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        rows.append(f"| `{definition.name}` | {definition.kind} | {labels} | {definition.meaning} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the table of now between its two marks."""
    begin = page.index("\n", page.index(BEGIN)) + 1
    return page[:begin] + table() + page[page.index(END) :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
