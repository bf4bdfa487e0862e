"""Alert rules and dashboard: checked by promtool, and asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mxbench.fleet.free_ports import free_port
from mxcore.metrics import EXPORTED, FAMILIES
from mxserver.telemetry import DEFINITIONS, MODEL_DEFINITIONS
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2
from tests.metrics.test_metrics import Rank, end_exporters
from tests.web.conftest import INITIALIZING, READY, WebServer, publish, start_web

__all__ = ["start_web"]  # a fixture

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus-rules.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def panels() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: tools/install_test_packages.sh installs Debian's prometheus")
    return found


def test_promtool_takes_the_rules() -> None:
    ran = subprocess.run([program("promtool"), "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_rules_fire_when_they_should_and_only_then() -> None:
    command = [program("promtool"), "test", "rules", DEPLOY / "prometheus-rules-test.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_has_a_test_and_is_explained() -> None:
    tested = (DEPLOY / "prometheus-rules-test.yaml").read_text()
    page = (DEPLOY.parent / "docs" / "reference" / "alerts.md").read_text()
    for alert in alerts():
        assert f"alertname: {alert['alert']}" in tested
        assert f"`{alert['alert']}`" in page
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]


def test_expressions_use_only_what_is_there() -> None:
    known: set[str] = set()
    definitions = (*DEFINITIONS, *MODEL_DEFINITIONS, *FAMILIES, *EXPORTED)
    for definition in definitions:
        suffixes = ("_bucket", "_count", "_sum") if definition.kind == "histogram" else ("",)
        known |= {definition.name + suffix for suffix in suffixes}
    expressions = [expr for _, expr in panels()] + [alert["expr"] for alert in alerts()]
    used = {name for expr in expressions for name in NAME.findall(expr)}
    assert used <= known
    on_dashboard = {name for _, expr in panels() for name in NAME.findall(expr)}
    missing = {d.name for d in definitions if not any(name.startswith(d.name) for name in on_dashboard)}
    assert missing == {"mxserver_build_info"}, "it is in the dashboard's choice of jobs"


def test_dashboard_has_no_fixed_data_source_and_no_overlap() -> None:
    assert "${datasource}" in json.dumps(DASHBOARD["panels"][0])
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine


NAME = re.compile(r"\bmx(?:server|worker)?_\w+")


class Prometheus:
    """A real one that scrapes a server and a worker twice a second as the chart's monitors do, with our rules."""

    def __init__(self, folder: Path, server: str, worker: str, rules: Path = RULES, scheme: str = "http") -> None:
        """`scheme` is the server's; its certificate may be anybody's."""
        scraped = [("mxserver", "/metrics", server), ("mxserver-models", "/metrics/models", server)]
        scraped.append(("mxworker", "/metrics", worker))
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": job,
                    "metrics_path": path,
                    "static_configs": [{"targets": [target]}],
                    "scheme": "http" if job == "mxworker" else scheme,
                    "tls_config": {"insecure_skip_verify": True},
                }
                for job, path, target in scraped
            ],
        }
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines.extend(self._process.stderr)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self._get("query", query=expression)
        assert answer["status"] == "success", (expression, answer)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["data"]["groups"] for rule in group["rules"]]

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=120) as answer:  # noqa: S310 - this machine
            data: dict[str, Any] = json.load(answer)
            return data

    def wait_until(self, met: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                if met():
                    return
            except OSError:
                assert self._process.poll() is None, self.lines
            assert time.monotonic() < deadline, (what, self.lines[-5:])
            time.sleep(0.1)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(120)
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture
def web(start_web: Callable[..., WebServer], tmp_path: Path) -> WebServer:
    return start_web(MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    """Two ranks of one engine, whose metrics have one port."""
    port = free_port()
    started = [Rank(port, tmp_path) for _ in range(2)]
    yield started
    for rank in started:
        rank.end(kill=True)
    end_exporters(tmp_path)


@pytest.fixture
def prometheus(web: WebServer, ranks: list[Rank], tmp_path: Path) -> Iterator[Prometheus]:
    opened = Prometheus(tmp_path, web.url.removeprefix("http://"), f"127.0.0.1:{ranks[0].port}")
    yield opened
    opened.close()


def test_every_panel_and_alert_has_an_answer(web: WebServer, prometheus: Prometheus) -> None:
    with ServerClient(web.address) as client:
        for n in range(3):
            report = load_pb2.LoadReport(load_id=str(n), path=load_pb2.LOAD_PATH_PEER_TCP, bytes=10**9, seconds=3)
            publish(client, f"w{n}", report=report)
        publish(client, "late", INITIALIZING)
        prometheus.wait_until(
            lambda: prometheus.query('mxserver_sources{state="ready"} == 3') != [], "the workers are scraped"
        )
        [source] = {one.mx_source_id for one in client.list_sources()}

        def calls_have_a_rate() -> bool:
            client.update_status(source, "w0", 0, READY)
            rate = "rate(mxserver_call_duration_seconds_count%s[1m])"
            asked = (rate % "" + " > 0", rate % '{method=~".*UpdateStatus"}')
            return all(prometheus.query(query) != [] for query in asked)

        prometheus.wait_until(calls_have_a_rate, "calls have a rate")
    for title, expression in panels():
        expression = expression.replace("$job", "mxserver").replace("$__rate_interval", "1m")
        if 'code!="OK"' not in expression and "certificate" not in expression:  # none failed, and it has none
            prometheus.wait_until(
                lambda expression=expression: prometheus.query(expression) != [],  # type: ignore[misc]
                f"{title}: {expression}",
            )
    prometheus.wait_until(
        lambda: all(rule["health"] == "ok" for rule in prometheus.rules()), "all rules were evaluated"
    )
    prometheus.wait_until(  # an evaluation before the first scrape has seen no server
        lambda: [rule["name"] for rule in prometheus.rules() if rule["state"] != "inactive"] == [], "no alert is active"
    )


def quick(rules: Path, folder: Path) -> Path:
    """The same alerts with short windows, so that they fire and clear while a test looks on."""
    text = re.sub(r"\[\d+[mh]\]", "[3s]", rules.read_text())
    file = folder / "quick-rules.yaml"
    file.write_text(re.sub(r"for: \d+m", "for: 1s", text))
    return file


def test_alerts_fire_and_clear_as_processes_die_and_come_back(
    start_web: Callable[..., WebServer], ranks: list[Rank], tmp_path: Path
) -> None:
    web = start_web(MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"))
    place = web.url.removeprefix("http://")
    rules = quick(RULES, tmp_path)
    prometheus = Prometheus(tmp_path, place, f"127.0.0.1:{ranks[0].port}", rules)

    def firing() -> set[str]:
        return {rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"}

    try:
        prometheus.wait_until(lambda: prometheus.query("mxworker_ranks == 2") != [], "both ranks are scraped")
        prometheus.wait_until(lambda: prometheus.query('up{job="mxserver"} == 1') != [], "the server is scraped")
        prometheus.wait_until(lambda: firing() == set(), "nothing fires")
        web.close()
        ranks[0].end(kill=True)
        prometheus.wait_until(lambda: "MxserverDown" in firing(), "the server's end is told")
        prometheus.wait_until(lambda: prometheus.query("mxworker_ranks_lost_total == 1") != [], "a rank is missed")
        port = place.rpartition(":")[2]
        start_web("--metrics-port", port, MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"))
        prometheus.wait_until(lambda: "MxserverDown" not in firing(), "the server is back")
        ranks[1].count("SELF_CHECKED_WRONG")
        prometheus.wait_until(lambda: "MxworkerMemoryDamaged" in firing(), "damaged memory is told")
        prometheus.wait_until(lambda: firing() == set(), "all is well, or long ago")
        ranks[1].end(kill=True)
        end_exporters(tmp_path)
        prometheus.wait_until(lambda: firing() == {"MxworkerDown"}, "the worker's end is told")
    finally:
        prometheus.close()
