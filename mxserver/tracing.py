"""OpenTelemetry traces of the server's calls: one span a call, a child of the caller's (W3C Trace Context).

Off by default. The packages come with the extra `otel` and are imported only when traces are on. The standard names
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER) say where spans go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from mxserver import __version__
from mxserver.calls import Around
from mxserver.telemetry import telling_status
from mxserver.wire import SettingError, install_command

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# The statuses that mean that the server failed, by OpenTelemetry's semantic conventions for gRPC servers.
_SERVER_FAILED = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


_ASKED_BY_ITSELF = "/model_express.mx.Probe/"  # once a second: spans that nobody wants


def otlp_provider() -> TracerProvider:
    """A provider that sends spans by OTLP over gRPC, in batches, from a thread of its own.

    Raises:
        SettingError: the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingError(
            f"traces cannot be sent: {error}; install the extra packages with "
            f"`{install_command('otel')}`, or leave traces off"
        ) from error
    resource = Resource.create({SERVICE_NAME: "mxserver", "service.version": __version__})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def call_spans(provider: TracerProvider) -> Around:
    """Makes a span around each call but the server's own to itself."""
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("mxserver", __version__)
    propagator = TraceContextTextMapPropagator()

    @contextmanager
    def traced(method: str, context: grpc.ServicerContext) -> Iterator[None]:
        if method.startswith(_ASKED_BY_ITSELF):
            yield
            return
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        service, _, name = method.lstrip("/").rpartition("/")
        with tracer.start_as_current_span(
            f"{service}/{name}",
            context=propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            record_exception=False,  # an abort is an answer; failures are in the log
            set_status_on_exception=False,
        ) as span:

            def ended(code: grpc.StatusCode) -> None:
                span.set_attribute("rpc.grpc.status_code", code.value[0])
                if code in _SERVER_FAILED:
                    span.set_status(Status(StatusCode.ERROR, code.name))

            with telling_status(context, ended):
                yield

    return traced
