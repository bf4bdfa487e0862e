"""`mx status`: is the server well, who serves which model, what is loading."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from mxcore.cli.connection import Connection, connection_options
from mxcore.cli.server_calls import json_option, server_client, wide_option
from mxcore.cli.tables import bytes_text, duration, refusal_lines, short_id, table, terminal_width
from mxserver.wire import split_scheme

if TYPE_CHECKING:
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.credentials import ClientCredentials
    from mxserver.wire.proto import p2p_pb2

EXIT_NOT_WELL = 1
DEFAULT_METRICS_PORT = 9401
PAGE_SECONDS = 5.0
SHOWN_ERRORS = 5

EPILOG = """
\b
Exit codes: 0 the server is well, 1 it answers and is not, 2 usage, 3 it does not answer, 5 it refused.
Progress of loads is on the status page; where that port cannot be reached, the rest is shown without it.
\b
Examples:
  mx status
  mx status --server mx-server:8001 --json
  mx status --page http://127.0.0.1:9401
  mx status --server https://mx-server:8001 --tls-ca ca.pem --token-file token
"""


@click.command(epilog=EPILOG)
@connection_options
@click.option("--page", metavar="URL", help="The status page. [default: port 9401 of the server]")
@wide_option
@json_option
def status(connection: Connection, page: str | None, wide: bool, as_json: bool) -> None:
    """The server's health, its models, and the loads that run."""
    with server_client(connection) as client:
        health = client.health()
        models = model_states(client)
        data, problem = page_status(page or default_page(client.address), connection.credentials)
    well = health.status == "ok" and (data is None or data["server"]["ready"])
    facts: dict[str, Any] = {
        "server": {
            "address": client.address,
            "version": health.version,
            "status": health.status,
            "uptime_seconds": health.uptime,
            "well": well,
        },
        "models": models,
        "loads": None if data is None else data["loads"],
        "loads_left_out": 0 if data is None else data.get("left_out", {}).get("loads", 0),
        "errors": None if data is None else data["errors"],
        "refusals": None if data is None else data.get("refusals", []),
        "not_shared": None if data is None else data.get("not_shared", []),
        "page_problem": problem,
    }
    click.echo(json.dumps(facts) if as_json else as_text(facts, whole=wide))
    sys.exit(0 if well else EXIT_NOT_WELL)


def model_states(client: ServerClient) -> list[dict[str, Any]]:
    """Workers by state for each model and source id."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for state, instances in instances_by_state(client).items():
        for instance in instances:
            counts[instance.model_name, instance.mx_source_id][state] += 1
    return [
        {"model_name": model, "source_id": source, **{state: counts[model, source][state] for state in STATE_NAMES}}
        for model, source in sorted(counts, key=lambda key: (key[0].lower(), key[1]))
    ]


STATE_NAMES = ("ready", "initializing", "stale")


def instances_by_state(client: ServerClient, **filters: Any) -> dict[str, list[p2p_pb2.SourceInstanceRef]]:
    """A listing does not contain the state, so it asks for each state."""
    from mxserver.wire.proto import p2p_pb2

    return {
        name: client.list_sources(status=p2p_pb2.SourceStatus.Value(f"SOURCE_STATUS_{name.upper()}"), **filters)
        for name in STATE_NAMES
    }


def default_page(address: str) -> str:
    """The status page beside a server: its host, port 9401, and TLS where the calls have it."""
    scheme, place = split_scheme(address)
    return f"{scheme}://{place.rpartition(':')[0]}:{DEFAULT_METRICS_PORT}"


def page_status(page: str, credentials: ClientCredentials) -> tuple[dict[str, Any] | None, str]:
    """The status page's data, or why there is none. Raises SettingError."""
    url = urlsplit(f"{page.rstrip('/')}/status")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise click.UsageError(f"--page {page!r} must begin with http:// or https://, and a host")
    secure = url.scheme == "https"
    request = urllib.request.Request(url.geturl())  # noqa: S310 - the scheme is checked above
    if token := credentials.authorization(("https://" if secure else "") + url.hostname):
        request.add_unredirected_header("Authorization", token)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # it is in the same cluster
    if secure:
        handlers.append(urllib.request.HTTPSHandler(context=credentials.ssl_context()))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=PAGE_SECONDS) as answer:
            data: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return None, f"{url.geturl()}: HTTP {error.code}: {error.read(200).decode(errors='replace').strip()}"
    except urllib.error.URLError as error:
        return None, f"{url.geturl()}: {getattr(error.reason, 'strerror', None) or error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, f"{url.geturl()}: {error}"
    if "loads" not in data or "server" not in data:
        return None, f"{url.geturl()} is not a status page of mxserver"
    return data, ""


def as_text(facts: dict[str, Any], *, whole: bool = False) -> str:
    width = None if whole else terminal_width()
    server = facts["server"]
    lines = [
        f"{server['address']}  version {server['version']}  up {duration(server['uptime_seconds'])}  "
        + ("well" if server["well"] else f"NOT WELL: {server['status']}")
    ]
    if facts["models"]:
        rows = [
            (model["model_name"], model["source_id"], *(str(model[state]) for state in STATE_NAMES))
            for model in facts["models"]
        ]
        head: tuple[str, ...] = ("MODEL", "SOURCE ID", "READY", "LOADING", "STALE")
        lines += ["", table(head, rows, width=width, may_shrink={"MODEL"})]
    else:
        lines += ["", "no worker has published yet"]
    if facts["loads"]:
        head = ("LOADING", "WORKER", "RANK", "DONE", "RATE", "LEFT", "PATH", "FROM")
        loads = [_load_row(load, whole=whole) for load in facts["loads"]]
        lines += ["", table(head, loads, width=width, may_shrink={"LOADING"})]
        if facts["loads_left_out"]:
            lines += [f"and {facts['loads_left_out']} more loads; the status page has them by model"]
    if facts["loads"] is None:
        lines += ["", f"progress of loads is not known: {facts['page_problem']}"]
    if facts["not_shared"]:
        names = ", ".join(facts["not_shared"])
        lines += ["", f"NOT SHARED: within the last hour no worker got weights of {names} from another"]
    if facts["refusals"]:
        lines += [refusal_lines(facts["refusals"]).removeprefix("\n")]
    if facts["errors"]:
        lines += ["", *(f"{error['kind']}: {error['text']}" for error in facts["errors"][:SHOWN_ERRORS])]
    return "\n".join(lines)


def _load_row(load: dict[str, Any], *, whole: bool) -> tuple[str, ...]:
    total = load["bytes_total"]
    done = (
        f"{min(100, 100 * load['bytes_done'] // total)} % of {bytes_text(total)}"
        if total
        else bytes_text(load["bytes_done"])
    )
    rate = load["bytes_per_second"]
    return (
        load["model_name"] or load["source_id"],
        short_id(load["worker_id"], whole=whole),
        str(load["worker_rank"]),
        done,
        "" if rate is None else f"{bytes_text(rate)}/s",
        "" if load["eta_seconds"] is None else duration(load["eta_seconds"]),
        load["path"],
        short_id(load["from_worker_id"], whole=whole),
    )
