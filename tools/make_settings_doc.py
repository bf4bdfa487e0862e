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

from mxcore.settings import WorkerSettings  # noqa: E402 - also from a tree that is not installed
from mxserver.settings import FLAGS, ServerSettings  # noqa: E402 - also from a tree that is not installed
from mxserver.wire.environment import BY_NAME, VARIABLES  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

Made by `python tools/make_settings_doc.py` from the code; a test checks that it is current.

A flag wins over the environment, the environment over the file, the file over the default. An empty value counts as
unset, and so does a value that Kubernetes injects for a service of the same name
(`MODEL_EXPRESS_SERVER_PORT=tcp://10.0.0.7:8001`).
Unknown names that begin with `MX_` or `MODEL_EXPRESS_` cause a warning with the nearest known name.
"""

SERVER = """\
## The server, `mxserver`

A value that breaks its rule keeps the server from starting: it prints one line that names the value (exit code 2). If
the store or a port cannot be used, it prints one line (exit code 1). `--store memory` forgets everything at the end;
`sqlite` keeps one file, which belongs to one server at a time; `redis` is for several servers over one Redis, which
needs `appendonly yes` and `appendfsync always` to keep what it acknowledged (not a Redis Cluster; the extra `redis`
installs the client). On SIGTERM or SIGINT the server refuses new calls, finishes running ones, and exits with 0; a
second signal cuts them.
"""

FILE = """\
### The file

`--config FILE` or `MX_CONFIG_FILE` names a TOML file with the names of the first column, such as `port = 9001`. An
unknown key is an error, which shows the nearest known one. `mxserver --print-config` writes the settings in force in
that form, each with its origin, without passwords. `mxserver --check-config` also checks certificates and the access
file. It exits with 0, or with 2 and one line that says what is wrong.

Certificates, keys, and the access file are read again when they change. If a new file cannot be used, the server logs
it and keeps the old one in use. The access file's form is in `docs/threat-model.md`.
"""

WORKER = """\
## Workers and other clients

A worker always starts: a bad value causes a warning with its rule, and the default is used. The engine can give
settings by name as well (`--model-loader-extra-config '{"layout": "raw"}'`); those win over the environment. Every
client of a server, `mx` included, reads certificates and token from the environment.

`https://` in the server's address means TLS only. Workers that have a certificate (`MX_TLS_CERT_FILE`) serve TLS and
call each other by TLS, so give one to the whole fleet. With `MX_TLS_CLIENT_CA_FILE` they accept only callers that
have a certificate as well.
"""

WITHOUT_EFFECT = """\
## Known names without an effect

Existing images set these names. This version does not read them, and logs a warning if they are set.
"""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return (inspect.getdoc(field.default_factory) or "").splitlines()[0].rstrip(".")
    if field.default in (None, (), ""):
        return "unset"
    if isinstance(field.default, tuple):
        return f"`{','.join(field.default)}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _server() -> Iterator[str]:
    yield "| name in the file | environment | flag | default | meaning | rule |"
    yield "|---|---|---|---|---|---|"
    for name, flag in FLAGS.items():
        field = ServerSettings.model_fields[name]
        meaning = BY_NAME[str(field.alias)].meaning
        yield f"| `{name}` | `{field.alias}` | `{flag}` | {_default(field)} | {meaning} | {field.description} |"


def _worker() -> Iterator[str]:
    yield "| environment | name for the engine | default | meaning |"
    yield "|---|---|---|---|"
    fields = {str(field.alias): (name, field) for name, field in WorkerSettings.model_fields.items()}
    for variable in VARIABLES:
        if variable.reader not in ("worker", "both") or not variable.has_effect:
            continue
        name, default = "", "unset"
        if variable.name in fields:
            name, field = f"`{fields[variable.name][0]}`", fields[variable.name][1]
            default = _default(field)
        yield f"| `{variable.name}` | {name} | {default} | {variable.meaning} |"


def _without_effect() -> Iterator[str]:
    yield "| environment | of | meaning |"
    yield "|---|---|---|"
    for variable in VARIABLES:
        if not variable.has_effect:
            yield f"| `{variable.name}` | {variable.reader} | {variable.meaning} |"


def render() -> str:
    """The whole page."""
    tables = ("\n".join(rows) + "\n" for rows in (_server(), _worker(), _without_effect()))
    server, worker, without_effect = tables
    return "\n".join([INTRODUCTION, SERVER, server, FILE, WORKER, worker, WITHOUT_EFFECT, without_effect])


if __name__ == "__main__":
    PAGE.write_text(render())
