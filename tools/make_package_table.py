"""Writes the table of packages in docs/explanation/architecture.md: `python tools/make_package_table.py`.

tests/test_layers.py holds it to the code. Sizes are not in it: they would change with every commit.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BEGIN = "<!-- packages:"
END = "<!-- end -->"
_LAYERS = ("vllm_plugin", "mxcore", "mxserver", "bench")


def rows() -> list[tuple[str, str]]:
    """Package, and what is in it by the first sentence of its docstring."""
    found = []
    for init in sorted(init for layer in _LAYERS for init in (ROOT / layer).rglob("__init__.py")):
        said = (ast.get_docstring(ast.parse(init.read_text())) or "").replace("\n", " ").partition(". ")[0].rstrip(".")
        found.append((str(init.parent.relative_to(ROOT)), said))
    return sorted(found, key=lambda row: (_LAYERS.index(row[0].split("/")[0]), row[0]))


def table() -> str:
    """One row a package."""
    lines = ["| package | what is in it |", "|---|---|"]
    lines += [f"| `{package}` | {said} |" for package, said in rows()]
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table of now between its two marks."""
    begin = page.index("\n", page.index(BEGIN)) + 1
    return page[:begin] + table() + page[page.index(END, begin) :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
