"""Alerts in a real Prometheus: a real server and real workers' exporters make each happen, and it clears afterwards.

test_prometheus.py has those of processes that die; here are those of what they tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mxbench.stand_ins.authority import Authority
from mxserver.wire import MxError
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, mx_pb2
from tests.cli.mx_process import mx
from tests.deploy.test_prometheus import RULES, Prometheus, alerts, quick, ranks
from tests.metrics.test_metrics import Rank
from tests.security.conftest import StartServer, authority, start_server
from tests.security.test_http_port import tls
from tests.web.conftest import READY, WebServer, publish, start_web

__all__ = ["authority", "ranks", "start_server", "start_web"]  # fixtures

OF_ENDS = {"MxserverDown", "MxworkerDown", "MxworkerMemoryDamaged"}  # test_prometheus.py
BY_PROMTOOL_ALONE = {
    "MxserverCallsSlow": "needs a store that takes seconds for each call, for minutes",
    "MxserverHeartbeatsLate": "the same",
    "MxserverQueuesFull": "the same, and a hundred callers",
}
_numbers = itertools.count()


def workers_vanish(client: ServerClient) -> None:
    """They never send a heartbeat."""
    for _ in range(4):
        publish(client, f"gone-{next(_numbers)}")


def loads_fall_back(client: ServerClient) -> None:
    left = [load_pb2.Fallback(path=load_pb2.LOAD_PATH_PEER_TCP, reason="no answer")]
    report = load_pb2.LoadReport(
        load_id=str(next(_numbers)), path=load_pb2.LOAD_PATH_STORAGE, bytes=1, seconds=1, fallbacks=left
    )
    publish(client, "slow", report=report)


def weights_are_doubted(client: ServerClient) -> None:
    source = publish(client, "teller").mx_source_id
    kind = mx_pb2.DOUBT_KIND_WRONG_CHUNKS
    text = f"look {next(_numbers)}"
    client.tell_doubt(mx_pb2.Doubt(kind=kind, mx_source_id=source, worker_id="teller", holders=["h"], text=text))


def nothing_is_shared(client: ServerClient) -> None:
    source = publish(client, "alone").mx_source_id
    side, reason = load_pb2.REFUSAL_SIDE_RECEIVE, load_pb2.REFUSAL_REASON_LAYOUT_MISMATCH
    refusal = load_pb2.Refusal(id=str(next(_numbers)), side=side, reason=reason, text="other")
    client.update_status(source, "alone", 0, READY, refusals=[refusal])


def something_is_shared(client: ServerClient) -> None:
    report = load_pb2.LoadReport(load_id=str(next(_numbers)), path=load_pb2.LOAD_PATH_PEER_TCP, bytes=1, seconds=1)
    publish(client, "together", report=report)


def downloads_fail(server: str, models: Path) -> None:
    for _ in range(4):
        assert mx("models", "--server", server, "get", f"file://{models}/missing").code != 0


def a_call_fails(client: ServerClient) -> None:
    with suppress(MxError):
        publish(client, f"refused-{next(_numbers)}")


OF_THE_SERVER: dict[str, Callable[[ServerClient], None]] = {
    "MxserverLeasesExpiring": workers_vanish,
    "MxserverLoadsFallBack": loads_fall_back,
    "MxserverWeightsDoubted": weights_are_doubted,
    "MxserverNothingShared": nothing_is_shared,
}
OF_A_LOST_STORE = {"MxserverNotReady", "MxserverStoreErrors", "MxserverCallsFailing"}
OF_DOWNLOADS = {"MxserverDownloadsFailing"}
OF_WORKERS = {"MxworkerWrongChunks": ("WRONG_CHUNKS", 5.0), "MxworkerSourcesSlow": ("STRAGGLERS", 20.0)}
OF_A_KILL = {"MxworkerRankLost"}
OF_A_CERTIFICATE = {"MxserverCertificateExpires"}


def test_every_alert_is_fired_for_real_or_says_why_not() -> None:
    fired = (
        OF_ENDS
        | OF_THE_SERVER.keys()
        | OF_A_LOST_STORE
        | OF_WORKERS.keys()
        | OF_A_KILL
        | OF_DOWNLOADS
        | OF_A_CERTIFICATE
    )
    assert not fired & BY_PROMTOOL_ALONE.keys()
    assert fired | BY_PROMTOOL_ALONE.keys() == {alert["alert"] for alert in alerts()}


def has_fired(prometheus: Prometheus, name: str) -> bool:
    """It may be over already: windows are short."""
    return prometheus.query(f'last_over_time(ALERTS{{alertname="{name}",alertstate="firing"}}[10m])') != []


def firing(prometheus: Prometheus) -> set[str]:
    return {rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"}


def test_alerts_fire_as_servers_and_workers_tell_what_is_wrong_and_clear(
    start_web: Callable[..., WebServer],
    ranks: list[Rank],
    tmp_path: Path,
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    cache = str(tmp_path / "cache")
    web = start_web(MODEL_EXPRESS_CACHE_DIRECTORY=cache, MX_FILE_SOURCES=str(models), MX_HEARTBEAT_TIMEOUT_SECS="1")
    place = web.url.removeprefix("http://")
    prometheus = Prometheus(tmp_path, place, f"127.0.0.1:{ranks[0].port}", quick(RULES, tmp_path))

    def until_fired(name: str, act: Callable[[], None]) -> None:
        def seen() -> bool:
            act()
            return has_fired(prometheus, name)

        prometheus.wait_until(seen, f"{name} fires")

    try:
        prometheus.wait_until(lambda: prometheus.query("mxworker_ranks == 2") != [], "both ranks are scraped")
        prometheus.wait_until(lambda: prometheus.query('up{job="mxserver"} == 1') != [], "the server is scraped")
        with ServerClient(web.address) as client:
            for name, act in OF_THE_SERVER.items():
                until_fired(name, lambda act=act: act(client))  # type: ignore[misc]
            something_is_shared(client)
            for name in OF_DOWNLOADS:
                until_fired(name, lambda: downloads_fail(web.address, models))
            state = tmp_path / "state.sqlite3"
            state.rename(tmp_path / "away")
            for name in sorted(OF_A_LOST_STORE):
                until_fired(name, lambda: a_call_fails(client))
            (tmp_path / "away").rename(state)
        for name, (family, amount) in OF_WORKERS.items():
            until_fired(name, lambda family=family, amount=amount: ranks[1].count(family, amount=amount))  # type: ignore[misc]
        ranks[0].end(kill=True)
        until_fired("MxworkerRankLost", lambda: None)
        prometheus.wait_until(lambda: firing(prometheus) == set(), "all is well again")
    finally:
        prometheus.close()


def test_a_certificate_that_ends_soon_is_told_until_it_is_renewed(
    start_server: StartServer, authority: Authority, ranks: list[Rank], tmp_path: Path
) -> None:
    port = tls(start_server, authority).metrics_port  # for a day
    worker = f"127.0.0.1:{ranks[0].port}"
    prometheus = Prometheus(tmp_path, f"127.0.0.1:{port}", worker, quick(RULES, tmp_path), "https")
    try:
        prometheus.wait_until(lambda: firing(prometheus) == OF_A_CERTIFICATE, "the end is near")
        authority.issue("server", "127.0.0.1", days=30)
        prometheus.wait_until(lambda: firing(prometheus) == set(), "the new one is taken without a restart")
    finally:
        prometheus.close()
