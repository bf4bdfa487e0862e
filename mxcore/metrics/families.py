"""The metrics of workers: one table. docs/reference/metrics.md has it too, made by tools/make_metrics_table.py.

Labels have listed values, so that there is a bound to what is stored and shown. `mx_load_seconds` and
`mx_load_phase_seconds` are names of NVIDIA's package, where they mean the same (tests/metrics/test_shared_names.py).
"""

from __future__ import annotations

from mxcore.metrics.recording import Family
from mxserver.wire.proto import load_pb2

TRANSPORTS = ("same-host", "cuda-ipc", "tcp", "rdma")
PATHS = ("p2p", "uri", "cache", "storage")
PHASES = ("join", "build", "fill", "process", "keep", "offer")
OUTCOMES = ("success", "error")
LEASE_EVENTS = ("granted", "busy", "draining", "released", "expired", "replaced", "cut")
# Those of NVIDIA's package, so that both packages' workers add up, and finer ones below.
LOAD_BUCKETS = (
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 120.0),
    *(300.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0),
)
SIDES = ("offer", "receive")
REASONS = tuple(
    name.removeprefix("REFUSAL_REASON_").lower() for name, number in load_pb2.RefusalReason.items() if number
)

LOADS = Family(
    "mxworker_loads_total", "counter", "loads that ended well, by where the weights came from", ("path",), (PATHS,)
)
LOAD_SECONDS = Family(
    "mx_load_seconds",
    "histogram",
    "the duration of loads, joining and offering included; those that failed have the path none",
    ("path", "outcome"),
    ((*PATHS, "none"), OUTCOMES),
    LOAD_BUCKETS,
)
PHASE_SECONDS = Family(
    "mx_load_phase_seconds", "histogram", "the phases of loads that ended well", ("phase",), (PHASES,), LOAD_BUCKETS
)
RECEIVED_BYTES = Family(
    "mxworker_received_bytes_total",
    "counter",
    "bytes of weights that came, verified: of other workers by transport (also of loads that failed later), of "
    "everything else with the transport none",
    ("path", "transport"),
    (PATHS, (*TRANSPORTS, "none")),
)
GIVEN_BYTES = Family(
    "mxworker_given_bytes_total",
    "counter",
    "bytes of weights that other workers were allowed to fetch",
    ("transport",),
    (TRANSPORTS,),
)
CHUNKS_VERIFIED = Family(
    "mxworker_chunks_verified_total", "counter", "chunks of other workers that had the right digest"
)
WRONG_CHUNKS = Family(
    "mxworker_wrong_chunks_total", "counter", "chunks of other workers that had not, and were refused"
)
STRAGGLERS = Family(
    "mxworker_stragglers_total", "counter", "workers that were dropped as sources because they were slow"
)
LEASES = Family(
    "mxworker_leases_total",
    "counter",
    "leases of readers: granted; refused as busy or draining; ended as released, expired, replaced, or cut",
    ("event",),
    (LEASE_EVENTS,),
)
LEASES_NOW = Family("mxworker_readers", "gauge", "readers that have a lease at the moment")
SERVING = Family("mxworker_serving", "gauge", "sets of weights that are served at the moment, one a rank and layout")
REFUSALS = Family(
    "mxworker_refusals_total",
    "counter",
    "weights that were not offered or not taken, by reason",
    ("side", "reason"),
    (SIDES, REASONS),
)
SELF_CHECKED = Family(
    "mxworker_self_checked_chunks_total",
    "counter",
    "chunks of its own memory that a worker compared with their digests",
)
SELF_CHECKED_WRONG = Family("mxworker_self_checked_wrong_chunks_total", "counter", "of these, those that were damaged")
SELF_CHECK_SECONDS = Family(
    "mxworker_self_check_seconds_total", "counter", "seconds of a core or device that these comparisons took"
)

FAMILIES = (
    LOADS,
    LOAD_SECONDS,
    PHASE_SECONDS,
    RECEIVED_BYTES,
    GIVEN_BYTES,
    CHUNKS_VERIFIED,
    WRONG_CHUNKS,
    STRAGGLERS,
    LEASES,
    LEASES_NOW,
    SERVING,
    REFUSALS,
    SELF_CHECKED,
    SELF_CHECKED_WRONG,
    SELF_CHECK_SECONDS,
)
EXPORTED = (
    Family("mxworker_ranks", "gauge", "ranks of this engine on this machine that live"),
    Family("mxworker_ranks_lost_total", "counter", "ranks that were killed, or ended without a goodbye"),
)
"""What the exporter knows by itself, and says in the same words."""
