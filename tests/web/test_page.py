"""The status page in a real Chromium: what it shows, that it is live, its policy, and how it looks."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, model_pb2, model_pb2_grpc
from tests.web.browser import Browser
from tests.web.conftest import INITIALIZING, READY, WebServer, identity, publish

GB = 10**9
PEER_TCP = load_pb2.LOAD_PATH_PEER_TCP
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def source_of(client: ServerClient, worker_id: str) -> str:
    return next(s.mx_source_id for s in client.list_sources() if s.worker_id == worker_id)


def report_progress(client: ServerClient, source: str, worker_id: str, done: int, *, total: int = 16 * GB) -> None:
    client.update_status(
        source,
        worker_id,
        0,
        INITIALIZING,
        load_progress=load_pb2.LoadProgress(
            load_id=f"load-{worker_id}",
            path=PEER_TCP,
            bytes_done=done,
            bytes_total=total,
            from_worker_id="decode-a1",
            holders=2,
        ),
    )


def test_empty_fleet_says_how_to_start_one(web: WebServer, browser: Browser) -> None:
    browser.open(web.url)
    browser.wait_until(lambda: browser.text("#state") == "ready", "the server is ready")
    assert f"MODEL_EXPRESS_URL=127.0.0.1:{web.port} vllm serve" in browser.text("#no-fleets")
    assert browser.console() == []


def test_load_is_followed_without_reloading(web: WebServer, client: ServerClient, browser: Browser) -> None:
    publish(client, "decode-a1")
    browser.open(web.url)
    browser.wait_until(lambda: "decode-a1" in browser.run("return document.body.textContent"), "the first worker")
    browser.run("window.sameDocument = true")
    source = publish(client, "decode-b2", INITIALIZING).mx_source_id
    for done in (2 * GB, 6 * GB):
        report_progress(client, source, "decode-b2", done)
        browser.wait_until(lambda done=done: f"{done // GB}.0 GB of 16.0 GB" in browser.text("#loads"), "bytes")
    browser.wait_until(lambda: re.search(r"GB/s|MB/s", browser.text("#loads")) is not None, "a rate")
    shown = browser.text("#loads")
    assert "37 %" in shown
    assert " left" in shown
    assert "peer, TCP" in shown
    assert "from decode-a1 and 1 more" in shown
    report = load_pb2.LoadReport(
        load_id="load-decode-b2", path=PEER_TCP, bytes=16 * GB, seconds=8, from_worker_id="decode-a1"
    )
    publish(client, "decode-b2", READY, report=report)
    browser.wait_until(lambda: "2.0 GB/s" in browser.text("#finished"), "the finished load")
    browser.wait_until(lambda: not browser.run("return document.querySelector('#loads').children.length"), "no load")
    assert browser.run("return window.sameDocument") is True
    assert browser.console() == []


def test_download_is_shown_while_it_runs(start_web: Callable[..., WebServer], browser: Browser, tmp_path: Path) -> None:
    """The hub is a socket that takes the question and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        web = start_web(MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"), HF_ENDPOINT=endpoint)
        with grpc.insecure_channel(web.address) as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            updates = stub.EnsureModelDownloaded(model_pb2.ModelDownloadRequest(model_name="org/big"))
            next(iter(updates))
            browser.open(web.url)
            browser.wait_until(lambda: "org/big" in browser.text("#downloading"), "the download")
            assert "resolving" in browser.text("#downloads")
            assert web.status()["downloads"][0]["provider"] == "hugging_face"
            updates.cancel()
        web.close()


def test_closed_fleet_stays_closed_while_others_come(web: WebServer, client: ServerClient, browser: Browser) -> None:
    publish(client, "one", of=identity("m/second"))
    browser.open(web.url)
    browser.wait_until(lambda: "m/second" in browser.text("#fleets"), "the fleet")
    browser.run("document.querySelector('#fleets summary').click()")  # few workers are open from the start
    publish(client, "two", of=identity("m/first"))
    browser.wait_until(lambda: "two · rank 0" in browser.text("#fleets"), "the other fleet and its worker")
    assert re.search(r"m/first.*two · rank 0.*m/second", browser.text("#fleets"), re.DOTALL)
    assert "one · rank 0" not in browser.text("#fleets")


def test_many_fleets_are_closed_and_one_that_is_opened_is_asked_for(
    web: WebServer, client: ServerClient, browser: Browser
) -> None:
    for n in range(21):
        publish(client, f"worker-{n}", of=identity(f"m/{n:02}"))
    browser.open(web.url)
    browser.wait_until(lambda: browser.run("return document.querySelectorAll('#fleets > li').length") == 21, "fleets")
    assert "1 ready" in browser.text("#fleets")
    shown = "return document.querySelectorAll('#fleets tbody tr').length"
    last = "document.querySelector('#fleets > li:last-child"
    assert browser.run(shown) == 0
    browser.run(f"{last} summary').click()")
    browser.wait_until(lambda: "worker-20" in browser.text("#fleets"), "the worker of the fleet that was opened")
    assert browser.run(shown) == 1
    assert browser.console() == []


def test_text_of_workers_is_never_markup(web: WebServer, client: ServerClient, browser: Browser) -> None:
    publish(client, HOSTILE, of=identity(HOSTILE, dtype=HOSTILE))
    fallback = load_pb2.Fallback(path=PEER_TCP, reason=HOSTILE)
    publish(client, "w", report=load_pb2.LoadReport(load_id="1", from_worker_id=HOSTILE, fallbacks=[fallback]))
    browser.open(web.url)
    browser.wait_until(lambda: HOSTILE in browser.text("#problems"), "the reason as text")
    assert HOSTILE in browser.text("#fleets")
    assert browser.run("return document.title") == "mxserver"
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.console() == []


def test_policy_refuses_inline_code_and_other_hosts(web: WebServer, browser: Browser) -> None:
    browser.open(web.url)
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.inlineRan = 1'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\" id=styled>x</p>');"
    )
    assert browser.run("return window.inlineRan") is None
    assert browser.run("return document.getElementById('styled').style.color") == ""
    refusals = browser.console()
    assert any("script-src" in message for message in refusals)
    assert any("style-src" in message for message in refusals)


def test_outage_shows_and_ends_by_itself(start_web: Callable[..., WebServer], browser: Browser) -> None:
    server = start_web()
    port = server.url.rsplit(":", 1)[1]
    browser.open(server.url)
    browser.wait_until(lambda: browser.text("#state") == "ready", "ready")
    server.close()
    browser.wait_until(lambda: browser.text("#state") == "no answer", "the outage")
    assert "trying again" in browser.text("#alarm")
    start_web("--metrics-port", port)
    browser.wait_until(lambda: browser.text("#state") == "ready", "the server is back")
    assert browser.run("return document.getElementById('alarm').hidden") is True


def make_fleet(client: ServerClient) -> None:
    """Something to look at: two models, loads that run, some history."""
    big = identity(
        "meta-llama/Llama-3.1-70B-Instruct", tensor_parallel_size=4, quantization="fp8", revision="a1b2c3d4e5f6a7b8"
    )
    for rank in range(4):
        publish(client, "prefill-0", of=big, rank=rank)
    for n in range(6):
        report = load_pb2.LoadReport(
            load_id=f"done-{n}",
            path=PEER_TCP if n else load_pb2.LOAD_PATH_STORAGE,
            bytes=16_381_470_720,
            seconds=7.4 + n if n else 31.0,
            from_worker_id="decode-5d9c7b6f4-0" if n else "",
            chunks_verified=977,
        )
        publish(client, f"decode-5d9c7b6f4-{n}", report=report)
    for n in range(3):
        publish(client, f"decode-77f8d9-{n}", INITIALIZING)
    publish(client, "prefill-1", INITIALIZING, of=big)
    lost = load_pb2.Fallback(
        path=PEER_TCP, reason="decode-5d9c7b6f4-2 made no progress for 5 s; went to another holder"
    )
    publish(
        client,
        "prefill-0",
        of=big,
        report=load_pb2.LoadReport(load_id="f", path=PEER_TCP, bytes=GB, seconds=2, fallbacks=[lost]),
    )


@pytest.mark.parametrize(
    ("name", "width", "height", "mobile", "dark"),
    [("desktop", 1280, 900, False, False), ("dark", 1280, 900, False, True), ("phone", 390, 844, True, False)],
)
def test_screenshot(
    web: WebServer,
    client: ServerClient,
    browser: Browser,
    tmp_path: Path,
    name: str,
    width: int,
    height: int,
    mobile: bool,
    dark: bool,
) -> None:
    """Nothing is wider than the window; the picture lies in the test's folder, to be looked at."""
    make_fleet(client)
    browser.size(width, height, mobile=mobile, dark=dark)
    browser.open(web.url)
    running = {f"decode-77f8d9-{n}": n + 1 for n in range(3)} | {"prefill-1": 2}
    for step in (1, 2, 3):
        for worker, speed in running.items():
            report_progress(client, source_of(client, worker), worker, step * speed * GB)
        browser.wait_until(lambda step=step: f"{step}.0 GB of 16.0 GB" in browser.text("#loads"), "the loads")
    browser.wait_until(lambda: "/s" in browser.text("#loads"), "a rate")
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    path = tmp_path / f"status-{name}.png"
    browser.screenshot(path)
    assert struct.unpack(">II", path.read_bytes()[16:24])[0] == width * (2 if mobile else 1)
    overflow = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    assert browser.run("return document.querySelectorAll('#loads > li').length") == 4
    assert browser.console() == []
