"""`mx sources` against a real server process."""

from __future__ import annotations

import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import mx_pb2
from tests.cli.mx_process import mx
from tests.web.conftest import INITIALIZING, WebServer, identity, publish, start_web, web

__all__ = ["start_web", "web"]  # fixtures


@pytest.fixture
def fleet(web: WebServer) -> WebServer:
    with ServerClient(web.address) as client:
        publish(client, "a", rank=0)
        publish(client, "a", rank=1)
        publish(client, "late", INITIALIZING)
        publish(client, "x", of=identity("other/model"))
    return web


def test_table(fleet: WebServer) -> None:
    ran = mx("sources", "--server", fleet.address)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].split()[:4] == ["MODEL", "SOURCE", "ID", "WORKER"]
    assert len(lines) == 5
    assert "NVIDIA H200" in lines[1]
    assert lines[1].endswith(" s ago")


@pytest.mark.parametrize(
    ("filters", "workers"),
    [
        ((), ["a", "a", "late", "x"]),
        (("--model", "OTHER/model"), ["x"]),
        (("--state", "initializing"), ["late"]),
        (("--rank", "1"), ["a"]),
        (("--state", "stale"), []),
        (("--model", "qwen/qwen3-8b", "--state", "ready", "--rank", "0"), ["a"]),
    ],
)
def test_filters(fleet: WebServer, filters: tuple[str, ...], workers: list[str]) -> None:
    ran = mx("sources", "--server", fleet.address, "--json", *filters)
    assert ran.code == 0
    assert sorted(source["worker_id"] for source in ran.json()["sources"]) == workers


def test_identities(fleet: WebServer) -> None:
    facts = mx("sources", "--server", fleet.address, "--json", "--identities").json()
    source = next(source for source in facts["sources"] if source["worker_id"] == "x")
    assert facts["identities"][source["source_id"]]["model_name"] == "other/model"
    text = mx("sources", "--server", fleet.address, "--identities", "--model", "other/model").out
    assert f"\n{source['source_id']}\n" in text
    assert "  dtype: bfloat16" in text


def test_doubts_are_named_below_the_workers(fleet: WebServer) -> None:
    with ServerClient(fleet.address) as client:
        source = client.list_sources()[0].mx_source_id
        client.tell_doubt(
            mx_pb2.Doubt(
                kind=mx_pb2.DOUBT_KIND_HOLDERS_DIFFER,
                mx_source_id=source,
                worker_id="late",
                holders=["a", "x"],
                chunks=3,
                text="nobody is believed\nat all " + 1000 * "!",
            )
        )
    [doubt] = mx("sources", "--server", fleet.address, "--json").json()["doubts"]
    assert (doubt["kind"], doubt["told_by"], doubt["holders"], doubt["chunks"]) == (
        "holders_differ",
        "late",
        ["a", "x"],
        3,
    )
    assert len(doubt["text"]) == 500  # what a worker sends is cut
    assert "holders_differ, told by late: nobody is believed at all !" in mx("sources", "--server", fleet.address).out
    assert [error["kind"] for error in fleet.status()["errors"]] == ["doubt"]


def test_none_fits(web: WebServer) -> None:
    ran = mx("sources", "--server", web.address)
    assert (ran.code, ran.out) == (0, f"no worker at {web.address} fits\n")


def test_no_server_is_exit_3() -> None:
    assert mx("sources", "--server", "127.0.0.1:1").code == 3


def test_bad_filter_is_exit_2() -> None:
    assert mx("sources", "--state", "sleepy").code == 2
