"""Metrics as a scrape sees them, and the rules their names keep."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxserver.calls import CallPool, Receiving
from mxserver.store import SystemClock
from mxserver.telemetry import (
    DEFINITIONS,
    MODEL_DEFINITIONS,
    Events,
    Metrics,
    ObservingInterceptor,
    call_metrics,
    measured_calls,
)
from mxserver.telemetry.metrics import PATHS, UNKNOWN, path_label
from mxserver.telemetry.model_metrics import MOST_MODELS, ModelMetrics
from mxserver.wire import StaleEpoch
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2
from tests.cli.mx_process import mx
from tests.web.conftest import INITIALIZING, READY, WebServer, ask, identity, publish, wait_for

P2P = "model_express.p2p.P2pService"


def exposition(web: WebServer) -> str:
    return ask(f"{web.url}/metrics").text


def test_every_definition_is_exposed(start_web: Callable[..., WebServer], tmp_path: Path) -> None:
    web = start_web(MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"))  # an unused cache has no figures
    families = {family.name for family in text_string_to_metric_families(exposition(web))}
    wanted = {definition.name.removesuffix("_total") for definition in DEFINITIONS}
    assert wanted <= families
    assert "process_resident_memory_bytes" in families


def test_promtool_finds_nothing_to_lint(web: WebServer) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: tools/install_test_packages.sh installs Debian's prometheus")
    ours = "\n".join(line for line in exposition(web).splitlines() if re.search(r"\bmxserver_", line)) + "\n"
    ran = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_names_keep_the_conventions() -> None:
    for definition in (*DEFINITIONS, *MODEL_DEFINITIONS):
        assert re.fullmatch(r"mxserver_[a-z_]+", definition.name)
        assert definition.name.endswith("_total") == (definition.kind == "counter"), definition.name
        assert definition.kind != "histogram" or definition.name.endswith("_seconds")
        assert definition.meaning


def test_sources_by_state(web: WebServer, client: ServerClient) -> None:
    publish(client, "a")
    publish(client, "b", of=identity("other"))
    publish(client, "c", INITIALIZING)
    wait_for(lambda: web.metric('mxserver_sources{state="ready"}') == 2)
    assert web.metric('mxserver_sources{state="initializing"}') == 1
    assert web.metric('mxserver_sources{state="stale"}') == 0
    assert web.metric("mxserver_models") == 2
    assert web.metric("mxserver_ready") == 1


def test_calls_by_method_and_code(web: WebServer, client: ServerClient) -> None:
    answer = publish(client, "a")
    publish(client, "a")
    with pytest.raises(StaleEpoch):
        client.update_status(answer.mx_source_id, "a", 0, READY, epoch=answer.epoch)
    name = "mxserver_call_duration_seconds_count"
    assert web.metric(f'{name}{{code="OK",method="{P2P}/PublishMetadata"}}') == 2
    assert web.metric(f'{name}{{code="FAILED_PRECONDITION",method="{P2P}/UpdateStatus"}}') == 1
    assert web.metric("mxserver_epochs_refused_total") == 1
    assert web.metric("mxserver_calls_in_progress") == 0
    assert [error["kind"] for error in web.status()["errors"]] == ["epoch"]


def test_unknown_methods_make_one_series(web: WebServer) -> None:
    with grpc.insecure_channel(web.address) as channel:
        for n in range(5):
            call = channel.unary_unary(f"/no.such.Service{n}/Method{n}")
            with pytest.raises(grpc.RpcError):
                call(b"", timeout=120)
    text = exposition(web)
    assert "no.such" not in text
    assert web.metric('mxserver_call_duration_seconds_count{code="UNIMPLEMENTED",method="unknown"}') == 5


def test_expired_leases_are_counted(start_web: Callable[..., WebServer]) -> None:
    web = start_web("--heartbeat-timeout", "0.5", "--gc-timeout", "0.5")
    with ServerClient(web.address) as client:
        publish(client, "a")
    wait_for(lambda: web.metric("mxserver_leases_expired_total") == 1)
    wait_for(lambda: web.metric("mxserver_records_deleted_total") == 1)
    assert [error["kind"] for error in web.status()["errors"]] == ["lease"]


def test_store_errors_are_counted_and_gauges_left_out(web: WebServer, client: ServerClient, tmp_path: Path) -> None:
    publish(client, "a")
    (tmp_path / "state.sqlite3").rename(tmp_path / "away")
    wait_for(lambda: (web.metric('mxserver_store_errors_total{operation="check"}') or 0) > 0)
    assert web.metric("mxserver_ready") == 0


def test_loads_and_bytes_by_path(web: WebServer, client: ServerClient) -> None:
    report = load_pb2.LoadReport(
        load_id="one", path=load_pb2.LOAD_PATH_PEER_TCP, bytes=1000, seconds=2.0, chunks_verified=7
    )
    report.fallbacks.add(path=load_pb2.LOAD_PATH_PEER_RDMA, reason="no device")
    publish(client, "a", report=report)
    publish(client, "a", report=report)  # the same call again
    strange = load_pb2.LoadReport(load_id="two", path=77, bytes=5, seconds=float("nan"))  # type: ignore[arg-type]
    source = publish(client, "b").mx_source_id
    client.update_status(source, "b", 0, READY, load_report=strange)
    assert web.metric('mxserver_loads_total{path="peer_tcp"}') == 1
    assert web.metric('mxserver_load_bytes_total{path="peer_tcp"}') == 1000
    assert web.metric('mxserver_load_duration_seconds_sum{path="peer_tcp"}') == 2
    assert web.metric('mxserver_load_fallbacks_total{path="peer_rdma"}') == 1
    assert web.metric("mxserver_chunks_verified_total") == 7
    assert web.metric('mxserver_loads_total{path="unknown"}') == 1
    assert web.metric('mxserver_loads_total{path="storage"}') == 0, "a series is there before its first event"


def test_models_have_a_page_of_their_own(web: WebServer, client: ServerClient) -> None:
    report = load_pb2.LoadReport(load_id="1", path=load_pb2.LOAD_PATH_PEER_RDMA, bytes=1000, seconds=0.07)
    publish(client, "a", of=identity("Org/One"), report=report)
    publish(client, "b", INITIALIZING, of=identity("Org/One"))
    publish(client, "c", of=identity("Org/Two"))
    labels = 'model="Org/One",path="peer_rdma"'
    text = ask(f"{web.url}/metrics/models").text
    assert f"mxserver_model_loads_total{{{labels}}} 1.0" in text
    assert f"mxserver_model_load_bytes_total{{{labels}}} 1000.0" in text
    for bound, count in (("0.05", 0), ("0.1", 1)):
        assert f'mxserver_model_load_duration_seconds_bucket{{le="{bound}",{labels}}} {count}.0' in text
    assert 'mxserver_model_workers{model="Org/One",state="ready"} 1.0' in text
    assert 'mxserver_model_workers{model="Org/One",state="initializing"} 1.0' in text
    assert 'mxserver_model_workers{model="Org/Two",state="ready"} 1.0' in text
    assert "Org/" not in exposition(web)
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {definition.name.removesuffix("_total") for definition in MODEL_DEFINITIONS} <= families


def test_names_of_models_are_bounded() -> None:
    metrics = ModelMetrics()
    for number in range(3 * MOST_MODELS):
        metrics.finished(f"{number}" * 1000, "storage", 1, 1.0)
        metrics.finished("kept", "peer_tcp", 1, 1.0)
    metrics.scrape_from(lambda: {f"m{number}": {"ready": 1} for number in range(3 * MOST_MODELS)})
    families = {family.name: family for family in metrics.registry.collect()}
    loaded = {sample.labels["model"] for sample in families["mxserver_model_loads"].samples}
    assert len(loaded) == MOST_MODELS
    assert "kept" in loaded
    assert all(len(name) <= 200 for name in loaded)
    workers = {sample.labels["model"]: sample.value for sample in families["mxserver_model_workers"].samples}
    assert len(workers) == MOST_MODELS + 1
    assert workers["other"] == 2 * MOST_MODELS


def test_downloads_and_cache(start_web: Callable[..., WebServer], tmp_path: Path) -> None:
    """A real download out of a folder, and one of what is not there."""
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    cache = str(tmp_path / "cache")
    web = start_web(MODEL_EXPRESS_CACHE_DIRECTORY=cache, MX_FILE_SOURCES=str(model.parent))
    assert web.metric("mxserver_cache_models") == 0
    for _ in range(2):  # the second time it is there: nothing is downloaded, counted, or logged as such
        assert mx("models", "--server", web.address, "get", f"file://{model}").code == 0
    assert sum("downloaded model=" in line for line in web.lines) == 1
    assert mx("models", "--server", web.address, "get", f"file://{model.parent}/missing").code != 0
    assert web.metric('mxserver_downloads_total{result="done"}') == 1
    assert web.metric('mxserver_downloads_total{result="failed"}') == 1
    assert web.metric("mxserver_download_bytes_total") == 12
    assert web.metric("mxserver_downloads_running") == 0
    wait_for(lambda: web.metric("mxserver_cache_models") == 1)
    assert web.metric("mxserver_cache_bytes") == 12
    status = web.status()
    assert status["downloads"] == []
    assert status["cache"]["models"] == 1
    assert [error["kind"] for error in status["errors"]] == ["download"]


def test_openmetrics_for_who_asks(web: WebServer) -> None:
    answer = ask(f"{web.url}/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_path_labels_are_a_finite_set() -> None:
    assert {path_label(number) for number in range(-3, 1000)} == {*PATHS.values(), UNKNOWN}


def test_two_servers_of_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.epochs_refused.inc()
    assert one.registry.get_sample_value("mxserver_epochs_refused_total") == 1
    assert other.registry.get_sample_value("mxserver_epochs_refused_total") == 0


class Held(grpc.GenericRpcHandler):
    """A call that is answered once it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.begun.set()
            assert self.may_end.wait(120)
            return b""

        return grpc.unary_unary_rpc_method_handler(call)


def test_time_in_the_queue_is_part_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller saw 23 s, the metric 3 ms (proofs/server/p21.py)."""
    now = [1000.0]
    monkeypatch.setattr(measured_calls.time, "perf_counter", lambda: now[0])
    metrics, held, pool = Metrics(), Held(), CallPool(1, "test", Receiving(2, 1.0))
    around, on_unknown = call_metrics(metrics, Events(SystemClock()))
    server = grpc.server(pool, interceptors=[ObservingInterceptor([around], on_unknown)])
    server.add_generic_rpc_handlers((held,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        first = channel.unary_unary("/s/call").future(b"", timeout=120)
        assert held.begun.wait(120)
        second = channel.unary_unary("/s/call").future(b"", timeout=120)
        while pool.unanswered != 1:
            assert not second.done()
        now[0] += 23.5
        held.may_end.set()
        assert (first.result(), second.result()) == (b"", b"")
    server.stop(None).wait()
    labels = {"method": "s/call", "code": "OK"}
    assert metrics.registry.get_sample_value("mxserver_call_duration_seconds_sum", labels) == 47.0
    assert pool.unanswered == 0
