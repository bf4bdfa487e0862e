"""Loads of real worker processes, as metrics, JSON and the status page in a real Chromium show them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.transfer.conftest import WorkerProcess, wait_for
from tests.web.browser import Browser
from tests.web.conftest import WebServer

MEGABYTES = 4


@pytest.fixture
def workers(web: WebServer) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """One that has weights and serves them, and one that has none."""
    settings = {"MX_SERVER_ADDRESS": web.address, "MX_TRANSPORT": "tcp"}
    task: dict[str, Any] = {"settings": settings, "megabytes": MEGABYTES}
    started = [WorkerProcess({**task, "seed": 7}, {}), WorkerProcess(task, {})]
    yield started[0], started[1]
    for worker in started:
        worker.end()


def test_from_the_first_byte_to_the_report(
    web: WebServer, workers: tuple[WorkerProcess, WorkerProcess], browser: Browser
) -> None:
    source, target = workers
    source_id = source.ask(do="serve")["worker_id"]
    target.ask(do="join")
    paused = target.ask(do="receive", pause_after_bytes=1)
    [load] = wait_for(lambda: [load for load in web.status()["loads"] if load["bytes_done"]])
    assert load["bytes_total"] == paused["total"]
    assert load["bytes_done"] == paused["paused_at"]
    assert (load["path"], load["from_worker_id"], load["holders"]) == ("peer_tcp", source_id, 1)
    assert web.metric("mxserver_loads_running") == 1
    browser.open(web.url)
    browser.wait_until(lambda: "1 rank loading" in browser.text("#models"), "the load")
    browser.wait_until(lambda: source_id[:12] in browser.text(".feeds-part"), "who gives")
    [given] = load["given"]
    assert (given["worker_id"], given["bytes"]) == (source_id, paused["paused_at"])
    browser.run("document.querySelector('.replicas li[data-key=\"" + source_id + "\"] summary').click()")
    titles = "return Array.from(document.querySelectorAll('.replicas td[title]'), (cell) => cell.title)"
    whole = f"{source_id}, weights read"
    browser.wait_until(lambda: whole in browser.run(titles), "the whole name in the tooltip, and who vouches")
    target.send(do="go on")
    assert target.read()["equal"]
    target.ask(do="serve")
    wait_for(lambda: web.metric("mxserver_loads_running") == 0)
    [done] = web.status()["finished_loads"]
    assert (done["bytes"], done["path"], done["from_worker_id"]) == (paused["total"], "peer_tcp", source_id)
    assert done["model_name"]
    assert done["chunks_verified"] > 0
    assert done["given"] == [{"worker_id": source_id, "bytes": paused["total"]}]
    assert (done["givers"], done["bytes_from_workers"]) == (1, paused["total"])
    assert done["transfer_seconds"] == done["seconds"] > 0
    assert done["process_seconds"] > 0
    assert done["node"] == socket.gethostname()
    assert web.metric('mxserver_loads_total{path="peer_tcp"}') == 1
    assert web.metric('mxserver_load_bytes_total{path="peer_tcp"}') == paused["total"]
    browser.wait_until(lambda: "1 load" in browser.text("#models"), "the finished load")
    browser.wait_until(lambda: browser.run("return document.querySelector('.loading').hidden"), "no load")
    assert "peer, TCP" in browser.run("return document.querySelector('.chart title').textContent")


def test_a_way_that_fails_and_a_load_from_storage(web: WebServer, workers: tuple[WorkerProcess, WorkerProcess]) -> None:
    _, target = workers
    target.ask(do="join")
    gone = {"source_id": "x", "worker_id": "gone", "worker_rank": 0, "endpoint": "127.0.0.1:1"}
    assert "error" in target.ask(do="receive", sources=[gone])
    paused = target.ask(do="load", bytes=10, total=100)
    [load] = wait_for(lambda: [load for load in web.status()["loads"] if load["path"] == "storage"])
    assert (load["bytes_done"], load["bytes_total"]) == (10, 100)
    assert paused == {"told": 10}
    target.send(do="go on")
    assert target.read() == {"told": 100}
    target.ask(do="close")  # it serves nothing: the goodbye tells how the load went
    [done] = wait_for(lambda: web.status()["finished_loads"])
    assert (done["path"], done["bytes"]) == ("storage", 100)
    assert done["model_name"]
    assert len(done["fallbacks"]) == 1
    assert (done["bytes_from_workers"], done["given"]) == (0, [])
    assert web.metric('mxserver_loads_total{path="storage"}') == 1
    assert any("gone" in error["text"] for error in web.status()["errors"])
