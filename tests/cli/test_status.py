"""`mx status` against a real server process."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.cli.tables import bytes_text, duration, short_id, table
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2
from tests.cli.mx_process import mx
from tests.web.conftest import INITIALIZING, WebServer, ask, identity, publish, start_web, wait_for, web

__all__ = ["start_web", "web"]  # fixtures


@pytest.fixture
def fleet(web: WebServer) -> WebServer:
    with ServerClient(web.address) as client:
        publish(client, "a1")
        publish(client, "a2")
        publish(client, "b", of=identity("other/model"))
        source = publish(client, "late", INITIALIZING).mx_source_id
        said = load_pb2.LoadProgress(
            load_id="1",
            path=load_pb2.LOAD_PATH_PEER_TCP,
            bytes_done=4 * 10**9,
            bytes_total=16 * 10**9,
            from_worker_id="a1",
        )
        client.update_status(source, "late", 0, INITIALIZING, load_progress=said)
    return web


def test_models_states_and_loads(fleet: WebServer) -> None:
    ran = mx("status", "--server", fleet.address, "--page", fleet.url)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"{fleet.address}  version ")
    assert lines[0].endswith("  well")
    assert lines[2].split() == ["MODEL", "SOURCE", "ID", "READY", "LOADING", "STALE"]
    assert lines[3].split()[0] == "other/model"
    assert lines[4].split()[0] == "Qwen/Qwen3-8B"
    assert "25 % of 16.0 GB" in ran.out
    assert ran.out.rstrip().endswith("peer_tcp  a1")


def test_json(fleet: WebServer) -> None:
    ran = mx("status", "--json", "--page", fleet.url, MODEL_EXPRESS_URL=f"http://{fleet.address}")
    facts = ran.json()
    assert facts["server"]["well"] is True
    by_name = {model["model_name"]: model for model in facts["models"]}
    assert by_name["Qwen/Qwen3-8B"]["ready"] == 2
    assert by_name["Qwen/Qwen3-8B"]["initializing"] == 1
    assert by_name["other/model"]["stale"] == 0
    assert [load["worker_id"] for load in facts["loads"]] == ["late"]
    assert facts["page_problem"] == ""


def test_without_the_page_the_rest_is_shown(web: WebServer) -> None:
    ran = mx("status", "--server", web.address, "--page", f"http://{web.address}")
    assert ran.code == 0
    assert "no worker has published yet" in ran.out
    assert "progress of loads is not known" in ran.out
    closed = mx("status", "--server", web.address, "--page", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1/status: Connection refused" in closed.out


def test_store_that_fails_is_exit_1(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "state.sqlite3").rename(tmp_path / "away")
    wait_for(lambda: ask(f"{web.url}/readyz").status == 503)  # what it said last holds for a second
    ran = mx("status", "--server", web.address, "--json", "--page", web.url)
    assert ran.code == 1 or (ran.code, "MX_STORE_UNAVAILABLE" in ran.err) == (3, True)


def test_no_server_is_exit_3_and_names_the_next_command() -> None:
    ran = mx("status", "--server", "127.0.0.1:1")
    assert ran.code == 3
    assert ran.out == ""
    assert "Connection refused [MX_SERVER_UNREACHABLE]" in ran.err
    assert "`mx doctor`" in ran.err
    assert "last error" not in ran.err
    with_json = mx("status", "--server", "127.0.0.1:1", "--json")
    error = with_json.json()["error"]
    assert (with_json.code, error["code"], error["exit_code"]) == (3, "MX_SERVER_UNREACHABLE", 3)
    assert "127.0.0.1:1" in error["message"]


@pytest.mark.parametrize("arguments", [("--server", "ftp://x"), ("--page", "file:///etc/passwd"), ("--nope",)])
def test_usage_is_exit_2(web: WebServer, arguments: tuple[str, ...]) -> None:
    assert mx("status", *arguments, MX_SERVER_ADDRESS=web.address).code == 2


@pytest.fixture
def other_page() -> Iterator[str]:
    """Something else that answers JSON on that port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_page_of_something_else(web: WebServer, other_page: str) -> None:
    ran = mx("status", "--server", web.address, "--json", "--page", other_page)
    assert ran.code == 0
    assert "is not a status page of mxserver" in ran.json()["page_problem"]


@pytest.mark.parametrize(
    ("make", "value", "text"),
    [
        (duration, 0.04, "0.0 s"),
        (duration, 61, "61 s"),
        (duration, 600, "10 min"),
        (duration, 10_000, "3 h"),
        (duration, 400_000, "5 d"),
        (bytes_text, 999, "999 B"),
        (bytes_text, 1.5e9, "1.5 GB"),
        (bytes_text, 2e15, "2.0 PB"),
    ],
)
def test_figures_for_people(make: Callable[[float], str], value: float, text: str) -> None:
    assert make(value) == text


def test_table_has_no_trailing_blanks() -> None:
    assert table(("A", "B"), [("long", ""), ("x", "y")]) == "A     B\nlong\nx     y"


@given(
    cells=st.lists(st.tuples(st.text("abc", max_size=60), st.text("xyz", max_size=60)), min_size=1),
    width=st.integers(30, 130),
)
def test_table_fits(cells: list[tuple[str, str]], width: int) -> None:
    lines = table(("A", "B"), cells, width=width, may_shrink={"A", "B"}).split("\n")
    assert all(len(line) <= width for line in lines)
    for line, (a, b) in zip(lines[1:], cells, strict=True):
        if len(a) <= 12 and len(b) <= 12:  # nothing shorter is cut
            assert line.split() == [*a.split(), *b.split()]


def test_a_column_that_may_not_shrink_is_whole() -> None:
    assert table(("A", "B"), [("a" * 40, "b" * 40)], width=60, may_shrink={"A"}).splitlines()[1] == (
        "a" * 8 + "…" + "a" * 9 + "  " + "b" * 40
    )


def test_only_long_hexadecimal_ids_are_shortened() -> None:
    assert short_id("0123456789abcdef" * 2) == "0123456789ab"
    assert short_id("0123456789abcdef" * 2, whole=True) == "0123456789abcdef" * 2
    assert short_id("worker-of-a-readable-name") == "worker-of-a-readable-name"
