"""Makes docs/reference/errors.md, and the same for the status page: every error's code, what it means, what to do.

The meaning is the first paragraph of the error's docstring, the advice that of error_advice.toml. A code
without advice, and advice without a code, end the run.
"""

from __future__ import annotations

import html
import importlib
import pkgutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mxcore  # noqa: E402 - of this checkout
import mxserver  # noqa: E402
from mxserver.wire import MxError  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "errors.md"
SERVED = ROOT / "mxserver" / "web" / "assets" / "errors.html"
ADVICE = ROOT / "tools" / "error_advice.toml"

INTRODUCTION = """# Error codes

Every error of ours ends with its code in brackets: `… [MX_NO_SOURCE]`. The code stays the same in all releases; the
text before it says what failed, where and with which values. This page is made by `python tools/make_errors_doc.py`.

Most of these never end a worker: where one place gives no weights, the next one is tried ([where weights come
from](../explanation/loading.md)), and the load's report has each reason under `paths` and `fallbacks`.
"""

SAFETENSORS = "MX_SAFETENSORS"
OF_A_BROKEN_FILE = "The file is not what a safetensors library writes: download it again, else tell its author."


def errors() -> Iterator[type[MxError]]:
    """All errors of server and core, those without a code of their own left out."""
    for package in (mxserver, mxcore):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found = [MxError]
    for error in found:
        found += [child for child in error.__subclasses__() if child not in found]
        if error.__module__.startswith(("mxcore", "mxserver")) and "code" in vars(error):
            yield error


HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Error codes</title>
<link rel="icon" href="icon.svg">
<link rel="stylesheet" href="page.css">
</head>
<body>
<header><a href="./"><img src="icon.svg" alt="Status page" width="28" height="28"></a><h1>Error codes</h1></header>
<main class="codes">
"""


def groups() -> dict[str, list[tuple[str, str, str]]]:
    """Codes with meaning and advice, by title. Raises ValueError for a code without advice, and the other way round."""
    meanings = {error.code: " ".join((error.__doc__ or "").split("\n\n")[0].split()) for error in errors()}
    advised: dict[str, dict[str, str]] = tomllib.loads(ADVICE.read_text())
    broken = {code: OF_A_BROKEN_FILE for code in sorted(meanings) if code.startswith(SAFETENSORS)}
    advised["Broken safetensors files"] = broken
    if wrong := {code for advice in advised.values() for code in advice} ^ meanings.keys():
        raise ValueError(f"advice and codes differ: {sorted(wrong)}")
    return {title: [(code, meanings[code], what) for code, what in advice.items()] for title, advice in advised.items()}


def page() -> str:
    """The whole of docs/reference/errors.md. Raises as `groups`."""
    parts = [INTRODUCTION]
    for title, codes in groups().items():
        parts.append(f"\n## {title}\n\n| code | what it means | what to do |\n|---|---|---|\n")
        parts += [f"| `{code}` | {meaning} | {what} |\n" for code, meaning, what in codes]
    return "".join(parts)


def served_page() -> str:
    """What the server answers at /errors. Raises as `groups`."""
    parts = [HEAD]
    for title, codes in groups().items():
        parts.append(f"<h2>{html.escape(title)}</h2>\n<dl>\n")
        for code, meaning, what in codes:
            said = f"<dd>{html.escape(meaning)}</dd><dd>{html.escape(what)}</dd>"
            parts.append(f'<dt id="{code}"><code>{code}</code></dt>{said}\n')
        parts.append("</dl>\n")
    return "".join([*parts, "</main>\n</body>\n</html>\n"])


if __name__ == "__main__":
    PAGE.write_text(page())
    SERVED.write_text(served_page())
