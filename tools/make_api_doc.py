"""Writes the reference in docs/reference/api.md from the docstrings of what `mxcore` exports.

tests/exchange/test_api_doc.py holds the page to the code.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import mxcore

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "api.md"
BEGIN = "<!-- reference: made by python tools/make_api_doc.py -->"
END = "<!-- end of the reference -->"


def reference() -> str:
    """A section a name, functions first."""
    exported = {name: getattr(mxcore, name) for name in mxcore.__all__ if name != "__version__"}
    functions = [_function(name, value) for name, value in exported.items() if inspect.isfunction(value)]
    classes = [_class(name, value) for name, value in exported.items() if inspect.isclass(value)]
    return "\n".join([*functions, *classes])


def with_reference(page: str) -> str:
    """The page with the reference of now between its two marks."""
    begin = page.index("\n", page.index(BEGIN)) + 1
    return page[:begin] + "\n" + reference() + page[page.index(END, begin) :]


def _function(name: str, value: Any) -> str:
    return f"### `{name}`\n\n```python\n{_signature(name, value)}\n```\n\n{_text(value)}\n"


def _class(name: str, value: type) -> str:
    lines = []
    for member, made in sorted(vars(value).items()):
        if member.startswith("_") or not (inspect.isfunction(made) or isinstance(made, property)):
            continue
        text = inspect.getdoc(made) or ""
        shown = member if isinstance(made, property) else f"{member}()"
        lines.append(f"- `{shown}`: {' '.join(text.split(chr(10) + chr(10))[0].split())}\n")
    return f"### `{name}`\n\n{_text(value)}\n" + ("\n" + "".join(lines) if lines else "")


def _signature(name: str, value: Any) -> str:
    """A line a parameter."""
    signature = inspect.signature(value)
    lines, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"{name}(\n{body}) -> {signature.return_annotation}"


def _text(value: Any) -> str:
    """The docstring; its lists of errors become code, which keeps their lines."""
    parts = []
    for part in (inspect.getdoc(value) or "").split("\n\n"):
        listed = any(line.startswith("    ") for line in part.splitlines())
        parts.append(textwrap.indent(part, "    ") if listed else part)
    return "\n\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text()))
