"""Makes docs/errors.md: every stable code of an error, what it means, and what to do.

The meaning is the first paragraph of the error's docstring, the advice that of error_advice.toml. A code
without advice, and advice without a code, end the run.
"""

from __future__ import annotations

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

PAGE = ROOT / "docs" / "errors.md"
ADVICE = ROOT / "tools" / "error_advice.toml"

INTRODUCTION = """# Error codes

Every error of ours ends with its code in brackets: `… [MX_NO_SOURCE]`. The code stays the same in all releases; the
text before it says what failed, where and with which values. This page is made by `python tools/make_errors_doc.py`.

Most of these never end a worker: where one place gives no weights, the next one is tried (docs/loading.md), and the
load's report has each reason under `paths` and `fallbacks`.
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


def page() -> str:
    """The whole page. Raises ValueError for a code without advice, and advice without a code."""
    meanings = {error.code: " ".join((error.__doc__ or "").split("\n\n")[0].split()) for error in errors()}
    groups: dict[str, dict[str, str]] = tomllib.loads(ADVICE.read_text())
    broken = {code: OF_A_BROKEN_FILE for code in sorted(meanings) if code.startswith(SAFETENSORS)}
    groups["Broken safetensors files"] = broken
    advised = [code for advice in groups.values() for code in advice]
    if wrong := {*advised} ^ meanings.keys():
        raise ValueError(f"advice and codes differ: {sorted(wrong)}")
    parts = [INTRODUCTION]
    for title, advice in groups.items():
        parts.append(f"\n## {title}\n\n| code | what it means | what to do |\n|---|---|---|\n")
        parts += [f"| `{code}` | {meanings[code]} | {what} |\n" for code, what in advice.items()]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
