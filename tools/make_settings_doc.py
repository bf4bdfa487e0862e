"""Makes docs/reference/settings.md from the code: one table a program, and the names that have no effect yet.

    python tools/make_settings_doc.py

tests/server/command/test_settings_doc.py holds the file to what this makes.
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
from mxserver.limits import DEFAULT, MEANINGS  # noqa: E402
from mxserver.settings import FLAGS, OTHER_NAMES, ServerSettings  # noqa: E402 - also from a tree that is not installed
from mxserver.wire import (  # noqa: E402
    BY_NAME,
    REMOVED,
    UNUSED,
    VARIABLES,
)

PAGE = ROOT / "docs" / "reference" / "settings.md"

INTRODUCTION = """\
# Settings

Made by `python tools/make_settings_doc.py` from the code; a test checks that it is current.

A flag wins over the environment, the environment over the file, the file over the default. An empty value counts as
unset, and so does a value that Kubernetes injects for a service of the same name
(`MODEL_EXPRESS_SERVER_PORT=tcp://10.0.0.7:8001`).
Names that begin with `MX_` or `MODEL_EXPRESS_` and are none of these are warned about, with the right one where one is
near. One that looks as if it were to protect something (`AUTH`, `TLS`, `SECURITY`, `SIGNATURE`) is not ignored: the
server does not start, and a worker calls nobody.
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

OTHER_NAMES_TEXT = """\
### Other names of these settings

Manifests for NVIDIA's server set them. Where two names of one setting are set and differ, the server does not start.
"""

MOVED = """\
`MODEL_EXPRESS_SECURITY_MODE=enforce` needs its accounts and audiences; without them the server does not start. In the
environment `MODEL_EXPRESS_SERVER_METRICS_PORT=0` turns probes over HTTP, metrics and page off, as there; on the command
line and in the file 0 takes a free port, and `off` turns them off.
"""

LIMITS = """\
### Limits

What callers may take of the server. A refusal names its limit; `MX_SERVER_LIMITS`, such as
`records=200000,stored_bytes=4GiB`, changes any of them, and `--print-config` prints all that are in force. A request
that is larger than both `publish_bytes` and `request_bytes` is refused by gRPC itself, which says `Received message
larger than max`. The defaults fit a server with 1 GiB of memory.
"""

FILE = """\
### The file

`--config FILE` names a TOML file with the names of the first column, such as `port = 9001`. An
unknown key is an error, which shows the nearest known one. `mxserver --print-config` writes the settings in force in
that form, each with its origin, without passwords. `mxserver --check-config` also checks certificates and the access
file. It exits with 0, or with 2 and one line that says what is wrong.

Certificates, keys, and the access file are read again when they change. If a new file cannot be used, the server logs
it and keeps the old one in use. The access file's form is in `docs/explanation/threat-model.md`.
"""

WORKER = """\
## Workers and other clients

A worker starts whatever its settings say: a bad value is warned about with its rule, in the load's summary line too,
and the default taken. The engine gives settings by name as well (`--model-loader-extra-config '{"layout": "raw"}'`);
those win over the environment. The certificates and the token are read from the environment by everything that calls a
server, `mx` included.

`https://` in the server's address means TLS only. Workers that have a certificate (`MX_TLS_CERT_FILE`) serve TLS and
call each other by TLS, so give one to the whole fleet. With `MX_TLS_CLIENT_CA_FILE` they accept only callers that
have a certificate as well. Weights in host memory go by TLS too, with all of these files; a core then moves about a
third of what it does in clear (`mx bench transfer`, tls_vs_plain). `MX_CHUNK_TLS=off`, given to all, turns that off.
"""

WITHOUT_EFFECT = """\
## Known names without an effect

Manifests for NVIDIA's ModelExpress set them. Server and workers say in one line of their log which of them are set; a
name with `*` stands for all that begin so. `POD_NAME`, `POD_UID`, `POD_NAMESPACE` and `LWS_LEADER_ADDRESS` are not read
either, and not told. `VLLM_PLUGINS` is vLLM's own ([vllm.md](vllm.md)).
"""


NO_MORE = """\
## Names that were settings

Development versions read them. Who sets one is told what to do instead; one that protects is not ignored, as above.
"""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return (inspect.getdoc(field.default_factory) or "").splitlines()[0].rstrip(".")
    if field.default in (None, (), ""):
        return "unset"
    if isinstance(field.default, tuple):
        return f"`{','.join(field.default)}`"
    if field.default is DEFAULT:
        return "as below"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _server() -> Iterator[str]:
    yield "| name in the file | environment | flag | default | meaning | rule |"
    yield "|---|---|---|---|---|---|"
    for name, flag in FLAGS.items():
        field = ServerSettings.model_fields[name]
        meaning = BY_NAME[str(field.alias)].meaning
        yield f"| `{name}` | `{field.alias}` | `{flag}` | {_default(field)} | {meaning} | {field.description} |"


def _limits() -> Iterator[str]:
    yield "| limit | default | of |"
    yield "|---|---|---|"
    for name, meaning in MEANINGS.items():
        yield f"| `{name}` | `{getattr(DEFAULT, name)}` | {meaning} |"


def _worker() -> Iterator[str]:
    yield "| environment | name for the engine | default | meaning |"
    yield "|---|---|---|---|"
    fields = {str(field.alias): (name, field) for name, field in WorkerSettings.model_fields.items()}
    for variable in VARIABLES:
        if variable.reader not in ("worker", "both", "plugin"):
            continue
        name, default = "", "unset"
        if variable.name in fields:
            name, field = f"`{fields[variable.name][0]}`", fields[variable.name][1]
            default = _default(field)
        yield f"| `{variable.name}` | {name} | {default} | {variable.meaning} |"


def _other_names() -> Iterator[str]:
    yield "| environment | is | values |"
    yield "|---|---|---|"
    for name, other in OTHER_NAMES.items():
        field = ServerSettings.model_fields[other.field]
        values = ", ".join(f"`{theirs}`: `{ours}`" for theirs, ours in other.values.items()) or field.description
        yield f"| `{name}` | `{field.alias}` | {values} |"


def _without_effect() -> Iterator[str]:
    yield "| environment | of | there | here |"
    yield "|---|---|---|---|"
    for unused in UNUSED:
        names = ", ".join(f"`{name}`" for name in unused.names)
        yield f"| {names} | {unused.reader} | {unused.meaning} | {unused.reason} |"


def _removed() -> Iterator[str]:
    yield "| environment | of | instead |"
    yield "|---|---|---|"
    for removed in REMOVED:
        yield f"| `{removed.name}` | {removed.reader} | {removed.instead} |"


def render() -> str:
    """The whole page."""
    tables = (
        "\n".join(rows) + "\n"
        for rows in (_server(), _limits(), _other_names(), _worker(), _without_effect(), _removed())
    )
    server, limits, other_names, worker, without_effect, removed = tables
    parts = [INTRODUCTION, SERVER, server, LIMITS, limits, OTHER_NAMES_TEXT, other_names, MOVED, FILE, WORKER, worker]
    return "\n".join([*parts, WITHOUT_EFFECT, without_effect, NO_MORE, removed])


if __name__ == "__main__":
    PAGE.write_text(render())
