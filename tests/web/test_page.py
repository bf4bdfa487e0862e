"""The status page in a real Chromium: what it shows, that it is live, its policy, a large fleet, and how it looks."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, model_pb2, model_pb2_grpc, mx_pb2, p2p_pb2
from tests.cli.mx_process import mx
from tests.web import believable_fleet
from tests.web.believable_fleet import GB, Deployment
from tests.web.browser import Browser
from tests.web.conftest import INITIALIZING, READY, WebServer, ask, identity, publish

PEER_TCP = load_pb2.LOAD_PATH_PEER_TCP
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
COUNT = "return document.querySelectorAll(arguments[0]).length"


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
            given=[load_pb2.GivenBytes(worker_id="decode-a1", bytes=done)],
        ),
    )


def test_empty_fleet_says_how_to_start_one(web: WebServer, browser: Browser) -> None:
    browser.open(web.url)
    browser.wait_until(lambda: browser.text("#state") == "ready", "the server is ready")
    assert f"MODEL_EXPRESS_URL=127.0.0.1:{web.port} vllm serve" in browser.text("#no-models")
    assert browser.console() == []


def test_load_is_followed_without_reloading(web: WebServer, client: ServerClient, browser: Browser) -> None:
    publish(client, "decode-a1")
    browser.open(web.url)
    browser.wait_until(lambda: "decode-a1" in browser.run("return document.body.textContent"), "the first worker")
    browser.run("window.sameDocument = true")
    source = publish(client, "decode-b2", INITIALIZING).mx_source_id
    for done in (2 * GB, 6 * GB):
        report_progress(client, source, "decode-b2", done)
        browser.wait_until(lambda done=done: f"{done // GB}.0 GB of 16.0 GB" in browser.text(".loading"), "bytes")
    browser.wait_until(lambda: re.search(r"GB/s|MB/s", browser.text(".loading")) is not None, "a rate")
    shown = browser.text(".loading")
    assert "37 %" in shown
    assert " left" in shown
    browser.wait_until(lambda: "decode-a1" in browser.text(".feeds-part"), "who gives")
    browser.wait_until(lambda: "/s now" in browser.text(".feeds-part"), "its rate")
    report = load_pb2.LoadReport(
        load_id="load-decode-b2",
        path=PEER_TCP,
        bytes=16 * GB,
        seconds=8,
        wait_seconds=1,
        transfer_seconds=8,
        process_seconds=3,
        given=[load_pb2.GivenBytes(worker_id="decode-a1", bytes=16 * GB)],
    )
    publish(client, "decode-b2", READY, report=report)
    browser.wait_until(lambda: "median, p95 12 s" in browser.text("#models .figures"), "the finished load")
    browser.wait_until(lambda: browser.run("return document.querySelector('.loading').hidden"), "no load")
    told = "return document.querySelector('.chart title').textContent"
    browser.wait_until(lambda: "wait 1.0 s, transfer 8.0 s, process 3.0 s" in browser.run(told), "its bar")
    assert "16.0 GB · 2.0 GB/s" in browser.run("return document.querySelector('.receivers').textContent")
    assert browser.run("return window.sameDocument") is True
    assert browser.console() == []


def test_loads_that_have_ended_are_there_after_a_restart(start_web: Callable[..., WebServer], browser: Browser) -> None:
    web = start_web()
    with ServerClient(web.address) as client:
        report = load_pb2.LoadReport(load_id="1", path=PEER_TCP, bytes=5 * GB, seconds=4)
        publish(client, "w", report=report)
    before = web.status("?model=Qwen/Qwen3-8B")
    web.close()
    again = start_web()
    after = again.status("?model=Qwen/Qwen3-8B")
    assert after["finished_loads"] == before["finished_loads"] != []
    assert after["models"][0]["history"] == before["models"][0]["history"]
    browser.open(again.url)
    browser.wait_until(lambda: "of 5.0 GB, 1 load" in browser.text("#models .figures"), "the load of before")


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


def test_cache_says_what_is_in_it(start_web: Callable[..., WebServer], browser: Browser, tmp_path: Path) -> None:
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    web = start_web(
        MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"),
        MX_FILE_SOURCES=str(model.parent),
        MX_CACHE_MAX_BYTES="1KB",
    )
    assert mx("models", "--server", web.address, "get", f"file://{model}", "--pin").code == 0
    browser.open(web.url)
    browser.wait_until(lambda: "of 1.0 KB" in browser.text("#cache"), "the cache")
    shown = browser.text("#cached")
    for text in (str(model), "pinned", "10 B", "used "):
        assert text in shown


def test_closed_model_stays_closed_while_others_come(web: WebServer, client: ServerClient, browser: Browser) -> None:
    publish(client, "one", of=identity("m/second"))
    browser.open(web.url)
    browser.wait_until(lambda: "one" in browser.text("#models .replicas"), "the model's replica")
    browser.run("document.querySelector('#models summary').click()")  # the only one is open from the start
    publish(client, "two", of=identity("m/first"))
    browser.wait_until(lambda: "m/first" in browser.text("#models"), "the other model")
    browser.wait_until(lambda: "two" in browser.text("#models"), "its replica")
    assert re.search(r"m/first.*two.*m/second", browser.text("#models"), re.DOTALL)
    assert browser.run("return document.querySelector('#models > li:last-child details').open") is False


def test_many_models_are_closed_and_one_that_is_opened_is_asked_for(
    web: WebServer, client: ServerClient, browser: Browser
) -> None:
    for n in range(21):
        publish(client, f"worker-{n}", of=identity(f"m/{n:02}"))
    browser.open(web.url)
    browser.wait_until(lambda: browser.run(COUNT, "#models > li") == 21, "models")
    assert "1 of 1 ready" in browser.text("#models")
    assert browser.run(COUNT, ".replicas > li") == 0
    browser.run("document.querySelector('#models > li:last-child summary').click()")
    browser.wait_until(lambda: "worker-20" in browser.text("#models"), "the worker of the model that was opened")
    assert browser.run(COUNT, ".replicas > li") == 1
    assert browser.console() == []


def test_text_of_workers_is_never_markup(web: WebServer, client: ServerClient, browser: Browser) -> None:
    worker = p2p_pb2.WorkerMetadata(pod_name=HOSTILE, node_name=HOSTILE, replica=HOSTILE, status=READY)
    fallback = load_pb2.Fallback(path=PEER_TCP, reason=HOSTILE)
    given = [load_pb2.GivenBytes(worker_id=HOSTILE, bytes=1)]
    report = load_pb2.LoadReport(load_id="1", bytes=1, seconds=1, given=given, fallbacks=[fallback])
    of = identity(HOSTILE, dtype=HOSTILE)
    source = client.publish(of, worker, HOSTILE, load_report=report).mx_source_id
    client.tell_doubt(mx_pb2.Doubt(mx_source_id=source, worker_id=HOSTILE, holders=[HOSTILE], text=HOSTILE))
    browser.open(web.url)
    browser.wait_until(lambda: HOSTILE in browser.text("#problems"), "the reason as text")
    browser.wait_until(lambda: HOSTILE in browser.text(".replicas"), "the pod as text")
    assert HOSTILE in browser.text("#doubts")
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


def test_codes_lead_to_what_they_mean(web: WebServer, client: ServerClient, browser: Browser) -> None:
    source = publish(client, "w").mx_source_id
    reason = load_pb2.REFUSAL_REASON_MEMORY_MOVES
    refusal = load_pb2.Refusal(id="1", side=load_pb2.REFUSAL_SIDE_OFFER, reason=reason, text="no [MX_CUDA]")
    client.update_status(source, "w", 0, READY, refusals=[refusal])
    client.tell_doubt(mx_pb2.Doubt(kind=mx_pb2.DOUBT_KIND_OWN_MEMORY, mx_source_id=source, worker_id="w", text="bits"))
    browser.open(web.url)
    browser.wait_until(lambda: "memory moves" in browser.text("#refusals"), "the refusal")
    hrefs = "return Array.from(document.querySelectorAll(arguments[0]), (link) => link.getAttribute('href'))"
    assert browser.run(hrefs, "#refusals a") == ["errors#MX_LAYOUT_UNSUPPORTED", "errors#MX_CUDA"]
    assert browser.run(hrefs, "#doubts a") == ["errors#MX_MEMORY_DAMAGED"]
    browser.run("document.querySelector('#doubts a').click()")
    browser.wait_until(lambda: browser.run("return document.title") == "Error codes", "the page of codes")
    shown = "const at = document.querySelector(':target'); return [at.textContent, at.getBoundingClientRect().top]"
    code, top = browser.run(shown)
    assert code == "MX_MEMORY_DAMAGED"
    assert 0 <= top < 900
    assert browser.console() == []


RANKS = Deployment("org/Large-405B", "large-405b-instruct-fp8-decode-tensor-parallel", 200, 8, 50 * GB)
ONE_LINE = (
    "return Array.from(document.querySelectorAll('.rows summary .name'), (one) => "
    "one.offsetHeight < 30 && (one.scrollWidth <= one.offsetWidth || one.title.startsWith(one.textContent)))"
)


def test_sixteen_hundred_ranks_stay_usable(
    start_web: Callable[..., WebServer], browser: Browser, tmp_path: Path
) -> None:
    """A page asks for tens of kilobytes, draws hundreds of elements, and says how many more there are of everything."""
    state = tmp_path / "large.sqlite3"
    believable_fleet.write_history(state, (RANKS,))
    web = start_web("--store-path", str(state))
    pods = RANKS.pods()
    with ServerClient(web.address) as client:
        believable_fleet.publish_ranks(client, RANKS, pods[:198])
        believable_fleet.publish_ranks(client, RANKS, pods[198:], INITIALIZING)
    browser.open(web.url)
    browser.wait_until(lambda: "198 of 200 ready" in browser.text("#models"), "the replicas")
    browser.wait_until(lambda: "and 180 more replicas" in browser.text(".replicas-part"), "how many are not listed")
    assert "the 30 slowest of 200 replicas" in browser.text(".timeline-part")
    assert "more givers with less" in browser.text(".feeds-part")
    assert browser.run(COUNT, ".replicas > li") == 20
    assert browser.run(COUNT, "*") < 3000
    asked = browser.run("return question()")
    assert "model=" in asked
    assert len(ask(asked).body) < 100_000
    assert len(ask(asked, Accept_Encoding="gzip").body) < 20_000
    assert web.status()["totals"]["workers"] == 1600
    whole = web.status("?model=org/Large-405B&replicas=10000&bars=10000&ranks=*")["details"]["org/large-405b"]
    assert sum(len(one["ranks"]) for one in whole["replicas"]) == 1600
    assert (len(whole["bars"]), whole["left_out"]["replicas"], whole["left_out"]["bars"]) == (200, 0, 0)
    assert browser.text(".replicas-part .more button") == "show 180 more"
    browser.run("document.querySelector('.replicas-part .more button').click()")
    browser.wait_until(lambda: browser.run(COUNT, ".replicas > li") == 200, "all replicas")
    browser.run("document.querySelector('.timeline-part .more button').click()")
    browser.wait_until(lambda: browser.run(COUNT, ".chart g") == 200, "all bars")
    for width, mobile in ((1280, False), (390, True)):
        browser.size(width, 900, mobile=mobile, dark=False)
        assert browser.run(ONE_LINE) == [True] * browser.run(COUNT, ".rows summary .name")
    pod = pods[77]
    search = (
        "const box = document.getElementById('search'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))"
    )
    browser.run(search, pod.upper())
    browser.wait_until(lambda: browser.run(COUNT, ".replicas > li") == 1, "the one that is searched for")
    assert pod in browser.text(".replicas")
    assert believable_fleet.node(pod) in browser.text(".replicas")
    browser.run("document.querySelector('.replicas summary').click()")
    browser.wait_until(lambda: browser.run(COUNT, ".replicas tbody tr") == 8, "its ranks")
    assert RANKS.workers(pod)[7][:12] in browser.text(".replicas")
    browser.run(search, "nobody")
    browser.wait_until(lambda: "0 models found" in browser.text("#found"), "that there is none")
    assert browser.console() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "mobile"), [(1280, 900, False), (390, 844, True)], ids=["wide", "phone"])
def test_screenshot(
    start_web: Callable[..., WebServer],
    browser: Browser,
    tmp_path: Path,
    width: int,
    height: int,
    mobile: bool,
    dark: bool,
) -> None:
    """Nothing is wider than the window; the pictures lie in the test's folder, to be looked at."""
    state = tmp_path / "state.sqlite3"
    believable_fleet.write_history(state)
    web = start_web("--store-path", str(state))
    with ServerClient(web.address) as client:
        source = believable_fleet.make_fleet(client)
        browser.size(width, height, mobile=mobile, dark=dark)
        browser.open(web.url)
        for step in (1, 2):
            believable_fleet.report_progress(client, source, step)
            browser.wait_until(lambda step=step: f"{5 * (step + 1)}.0 GB of" in browser.text("#models"), "the loads")
    browser.wait_until(lambda: "/s" in browser.text("#models"), "a rate")
    browser.screenshot(tmp_path / "closed.png")
    browser.run("document.querySelectorAll('#models > li > details').forEach((one) => { one.open = true; })")
    browser.wait_until(lambda: browser.run(COUNT, "#models .chart svg") == 3, "all details")
    browser.run("document.querySelector('.replicas details').open = true")
    browser.wait_until(lambda: browser.run(COUNT, ".replicas tbody tr") > 0, "ranks")
    path = tmp_path / "open.png"
    browser.screenshot(path)
    assert struct.unpack(">II", path.read_bytes()[16:24])[0] == width * (2 if mobile else 1)
    overflow = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    assert browser.console() == []
