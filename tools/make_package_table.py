"""Writes the table of packages and their sizes in docs/ARCHITECTURE.md: `python tools/make_package_table.py`.

tests/test_layers.py holds packages and modules to the code; the lines are those of the day on which this ran.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
BEGIN = "<!-- packages:"
END = "<!-- end -->"
_LAYERS = ("vllm_plugin", "mxcore", "mxserver", "bench")
_CODE = {".py", ".pyx", ".pxd", ".pyi", ".h", ".cu", ".proto"}


def _lines(files: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in files)


def rows() -> list[tuple[str, str, int, int]]:
    """Package, what is in it, modules, lines (stubs that are made of .proto files left out)."""
    found = []
    for init in sorted(init for layer in _LAYERS for init in (ROOT / layer).rglob("__init__.py")):
        files = [path for path in init.parent.iterdir() if path.suffix in _CODE and "_pb2" not in path.name]
        names = {path.stem for path in files if path.suffix in {".py", ".pyx", ".proto"}} - {"__init__"}
        said = (ast.get_docstring(ast.parse(init.read_text())) or "").replace("\n", " ").partition(". ")[0].rstrip(".")
        found.append((str(init.parent.relative_to(ROOT)), said, len(names), _lines(files)))
    return sorted(found, key=lambda row: (_LAYERS.index(row[0].split("/")[0]), row[0]))


def table() -> str:
    """One row a package."""
    lines = ["| package | what is in it | modules | lines |", "|---|---|---:|---:|"]
    lines += [f"| `{package}` | {said} | {modules} | {count:,} |" for package, said, modules, count in rows()]
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table of now between its two marks."""
    begin = page.index("\n", page.index(BEGIN)) + 1
    return page[:begin] + table() + page[page.index(END, begin) :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
