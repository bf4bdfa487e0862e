"""Makes docs/settings.md from the code: one table a program, and the names that have no effect yet.

    python tools/make_settings_doc.py

tests/server/test_settings_doc.py holds the file to what this makes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxserver.settings import FLAGS, ServerSettings  # noqa: E402 - also from a tree that is not installed
from mxserver.wire.environment import BY_NAME, VARIABLES  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

Made by `python tools/make_settings_doc.py` from the code; a test holds it true.

A flag wins over the environment, the environment over the default. An empty value counts as unset, and so does a
value that Kubernetes injects for a service of the same name (`MODEL_EXPRESS_SERVER_PORT=tcp://10.0.0.7:8001`).
Names that begin with `MX_` or `MODEL_EXPRESS_` and are none of these are warned about, with the nearest right one.
"""

SERVER = """\
## The server, `mxserver`

A value that breaks its rule keeps the server from starting: one line that names it, exit code 2. A store or a port
that cannot be used: one line, exit code 1. `--store memory` forgets everything at the end; `sqlite` keeps one file,
which belongs to one server at a time. On SIGTERM or SIGINT the server refuses new calls, finishes those that run, and
ends with 0; a second signal cuts them.
"""

WITHOUT_EFFECT = """\
## Known names without an effect

Existing images set them, this version does not read them, and says so in its log where they are set.
"""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return (inspect.getdoc(field.default_factory) or "").splitlines()[0].rstrip(".")
    if field.default is None or field.default == ():
        return "unset"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _server() -> Iterator[str]:
    yield "| environment | flag | default | meaning | rule |"
    yield "|---|---|---|---|---|"
    for name, flag in FLAGS.items():
        field = ServerSettings.model_fields[name]
        meaning = BY_NAME[str(field.alias)].meaning
        yield f"| `{field.alias}` | `{flag}` | {_default(field)} | {meaning} | {field.description} |"


def _without_effect() -> Iterator[str]:
    yield "| environment | of | meaning |"
    yield "|---|---|---|"
    for variable in VARIABLES:
        if not variable.has_effect:
            yield f"| `{variable.name}` | {variable.reader} | {variable.meaning} |"


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION, SERVER, "\n".join(_server()) + "\n", WITHOUT_EFFECT, "\n".join(_without_effect()) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
