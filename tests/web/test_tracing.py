"""Traces: spans of real calls, in memory, and sent by OTLP to a collector of our own."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mxserver.operations import Operations
from mxserver.services import HealthService, P2pService
from mxserver.store import Leases, MemoryStore
from mxserver.wire import ServerUnreachable
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import health_pb2, health_pb2_grpc
from tests.web.conftest import WebServer, publish

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def traced() -> Iterator[tuple[str, InMemorySpanExporter, MemoryStore]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    store = MemoryStore()
    operations = Operations(store, lease_seconds=90, provider=provider)
    server = grpc.server(ThreadPoolExecutor(4), interceptors=operations.interceptors)
    P2pService(operations.store, Leases(), operations.loads).add_to(server)
    health_pb2_grpc.add_HealthServiceServicer_to_server(HealthService(lambda: None), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", exporter, store
    server.stop(None).wait()
    operations.close()
    operations.close()


def test_span_is_a_child_of_the_callers(traced: tuple[str, InMemorySpanExporter, MemoryStore]) -> None:
    address, exporter, _ = traced
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthServiceStub(channel)
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("junk-bin", b"\xff"))
        stub.GetHealth(health_pb2.HealthRequest(), metadata=metadata, timeout=120)
    [span] = exporter.get_finished_spans()
    assert span.name == "model_express.health.HealthService/GetHealth"
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == 0


def test_failure_of_the_store_is_an_error(traced: tuple[str, InMemorySpanExporter, MemoryStore]) -> None:
    address, exporter, store = traced
    store.close()
    with ServerClient(address) as client, pytest.raises(ServerUnreachable):
        publish(client, "w")
    [span] = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.UNAVAILABLE.value[0]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.received: queue.SimpleQueue[trace_service_pb2.ExportTraceServiceRequest] = queue.SimpleQueue()

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.received.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_otlp_reaches_a_collector(start_web: Callable[..., WebServer]) -> None:
    """A real server process sends its spans, those of the last moment at the end."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    web = start_web(
        "--traces", "otlp", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_SERVICE_NAME="mx-staging"
    )
    with ServerClient(web.address) as client:
        client.health()
    web.process.terminate()
    assert web.wait() == 0
    request = collector.received.get(timeout=120)
    server.stop(None).wait()
    [resource] = request.resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "mx-staging"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == [
        "model_express.health.HealthService/GetHealth"
    ]


def test_nothing_of_it_is_imported_by_default() -> None:
    program = "import sys, mxserver.server; print('opentelemetry' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
