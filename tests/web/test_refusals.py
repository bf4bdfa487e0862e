"""Weights that are not shared: counted once, under bounded labels, and told on every page."""

from __future__ import annotations

import pytest

from mxserver.store import RecordKey
from mxserver.telemetry import REASONS, SIDES, Events, Metrics, Refusals
from mxserver.telemetry.refusals import KEPT_SOURCES, MOST_AT_ONCE, WINDOW_SECONDS
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2
from tests.cli.mx_process import mx
from tests.web.browser import Browser
from tests.web.conftest import READY, WebServer, publish
from tests.web.test_loads import HandClock

KEY = RecordKey("s", "w", 0)
OFFER, RECEIVE = load_pb2.REFUSAL_SIDE_OFFER, load_pb2.REFUSAL_SIDE_RECEIVE
MISMATCH = load_pb2.REFUSAL_REASON_LAYOUT_MISMATCH


def refusal(
    number: int,
    side: load_pb2.RefusalSide.ValueType = RECEIVE,
    reason: load_pb2.RefusalReason.ValueType = MISMATCH,
) -> load_pb2.Refusal:
    return load_pb2.Refusal(id=str(number), side=side, reason=reason, text=f"text {number}")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def refusals(clock: HandClock) -> Refusals:
    return Refusals(Metrics(), Events(clock), clock)


def test_a_repeated_call_counts_once(refusals: Refusals) -> None:
    for _ in range(3):
        refusals.told(KEY, [refusal(1), refusal(2), refusal(3, OFFER)], "org/m")
    assert [(each.side, each.reason, each.count, each.text) for each in refusals.newest()] == [
        (RECEIVE, MISMATCH, 2, "text 2"),
        (OFFER, MISMATCH, 1, "text 3"),
    ]
    assert refusals.newest("another") == []


def test_what_a_client_sends_is_bounded(refusals: Refusals) -> None:
    """Values that this version has no name for are one label; texts, sources and a call's length have limits."""
    strange = load_pb2.Refusal(side=99, reason=999, text="x" * 10_000)  # type: ignore[arg-type]
    refusals.told(KEY, [strange], "m" * 10_000)
    [count] = refusals.newest()
    assert (count.side, count.reason, len(count.text), len(count.model_name)) == (0, 0, 500, 256)
    refusals.told(KEY, [refusal(n) for n in range(10 * MOST_AT_ONCE)], "m")
    assert refusals.newest()[1].count == MOST_AT_ONCE
    for number in range(KEPT_SOURCES + 10):
        refusals.told(RecordKey(f"s{number}", "w", 0), [refusal(-1 - number)], "m")
    assert len({each.mx_source_id for each in refusals.newest()}) == KEPT_SOURCES


def test_a_model_is_not_shared_while_it_is_refused_and_nobody_gets_it(refusals: Refusals, clock: HandClock) -> None:
    refusals.told(KEY, [refusal(1)], "org/M")
    refusals.told(RecordKey("other", "w", 0), [refusal(2)], "org/other")
    assert refusals.not_shared() == ["org/M", "org/other"]
    refusals.shared("ORG/m")
    assert refusals.not_shared() == ["org/other"]
    clock.now += WINDOW_SECONDS + 1
    assert refusals.not_shared() == []
    refusals.told(KEY, [refusal(3)], "org/M")
    assert refusals.not_shared() == ["org/M"], "what was shared an hour ago is not now"


def test_metrics_json_page_and_commands_have_it(web: WebServer, browser: Browser) -> None:
    series = 'mxserver_refusals_total{reason="layout_mismatch",side="receive"}'
    assert (web.metric(series), web.metric("mxserver_models_not_shared")) == (0, 0)
    with ServerClient(web.address) as client:
        source = publish(client, "w").mx_source_id
        told = [refusal(1), refusal(2, OFFER, load_pb2.REFUSAL_REASON_MEMORY_MOVES)]
        for _ in range(2):
            client.update_status(source, "w", 0, READY, refusals=told)
    assert (web.metric(series), web.metric("mxserver_models_not_shared")) == (1, 1)
    status = web.status()
    assert {(each["side"], each["reason"], each["count"]) for each in status["refusals"]} == {
        ("receive", "layout_mismatch", 1),
        ("offer", "memory_moves", 1),
    }
    assert status["not_shared"] == ["Qwen/Qwen3-8B"]
    browser.open(web.url)
    browser.wait_until(lambda: "Qwen/Qwen3-8B, not taken: text 1" in browser.text("#refusals"), "the refusal")
    assert "no worker got weights of Qwen/Qwen3-8B from another" in browser.text("#not-shared")
    shown = mx("status", "--server", web.address, "--page", web.url).out
    assert "NOT SHARED: within the last hour no worker got weights of Qwen/Qwen3-8B from another" in shown
    listed = mx("sources", "--server", web.address)
    for text in (shown, listed.out):
        assert f"Qwen/Qwen3-8B {source}: not offered, memory_moves, 1 times; last by w: text 2" in text
    assert len(mx("sources", "--server", web.address, "--json").json()["refusals"]) == 2
    report = load_pb2.LoadReport(load_id="1", path=load_pb2.LOAD_PATH_PEER_TCP, bytes=1, seconds=1)
    with ServerClient(web.address) as client:
        publish(client, "v", report=report)
    assert web.metric("mxserver_models_not_shared") == 0


def test_every_reason_has_a_series_before_the_first_refusal() -> None:
    metrics = Metrics()
    for side in SIDES.values():
        for reason in (*REASONS.values(), "unknown"):
            labels = {"side": side, "reason": reason}
            assert metrics.registry.get_sample_value("mxserver_refusals_total", labels) == 0
