"""Workers' records folded into replicas: the ranks of one engine, which are ready together or not at all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mxserver.store import RecordKey, SourceRecord
from mxserver.telemetry import STATES
from mxserver.wire.proto import mx_pb2, p2p_pb2, record_pb2

Json = dict[str, Any]
State = Literal["initializing", "incomplete", "ready", "stale"]

# The order of lists: those that load first, then those that lack ranks, that serve, that are gone.
STATE_ORDER: dict[State, int] = {"initializing": 0, "incomplete": 1, "ready": 2, "stale": 3}
_READY = p2p_pb2.SOURCE_STATUS_READY
_INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING


class Names(NamedTuple):
    """What people know a worker by. `replica` is empty where the worker does not say it."""

    replica: str
    pod: str
    node: str


class NamesOfRecords:
    """Reads names out of records' metadata, once for each epoch. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[RecordKey, tuple[int, Names]] = {}

    def of(self, records: Iterable[SourceRecord]) -> dict[RecordKey, Names]:
        """Those of all records; what is not among them is forgotten."""
        known = {record.key: self._one(record) for record in records}
        self._known = known
        return {key: names for key, (_, names) in known.items()}

    def _one(self, record: SourceRecord) -> tuple[int, Names]:
        before = self._known.get(record.key)
        if before is not None and before[0] == record.epoch:
            return before
        facts = record_pb2.WorkerFacts.FromString(record.worker)
        return record.epoch, Names(facts.replica, facts.pod_name, facts.node_name)


@dataclass(slots=True)
class Replica:
    """The ranks of one engine, of one model; a worker that names no engine is a replica by itself.

    `pod` and `node` are those of its lowest rank.
    """

    name: str
    model_name: str
    told: bool  # its workers said that they are one engine
    pod: str = ""
    node: str = ""
    ranks: list[SourceRecord] = field(default_factory=list)
    state: State = "stale"

    @property
    def counted_as(self) -> str:
        """What it is the next life of, where that is known: an engine that starts again in its pod."""
        return self.pod or self.name

    def matches(self, text: str) -> bool:
        """Whether one of its names has this text, in lower case, in it."""
        names = {self.name, self.model_name, self.pod, self.node}
        for record in self.ranks:
            names |= {record.key.source_id, record.key.worker_id, record.accelerator, record.endpoint}
        return any(text in name.lower() for name in names)

    def as_json(self, now_ms: int, *, with_ranks: bool) -> Json:
        """`silent_seconds` is that of the rank that was silent longest; ranks are listed if they are wanted."""
        states = Counter(STATES.get(record.status, "unknown") for record in self.ranks)
        loads = [record.source_load for record in self.ranks if record.source_load is not None]
        found: Json = {
            "replica": self.name,
            "pod": self.pod,
            "node": self.node,
            "state": self.state,
            "ranks_total": len(self.ranks),
            **{state: states.get(state, 0) for state in STATES.values()},
            "accelerator": self.ranks[0].accelerator,
            "endpoint": next((record.endpoint for record in self.ranks if record.endpoint), ""),
            "source_load": sum(loads) if loads else None,
            "silent_seconds": max(0.0, (now_ms - min(record.updated_at_ms for record in self.ranks)) / 1000),
        }
        if with_ranks:
            found["ranks"] = [_rank(record, now_ms) for record in self.ranks]
        return found


def folded(records: Iterable[SourceRecord], names: Mapping[RecordKey, Names]) -> dict[str, list[Replica]]:
    """Replicas by their model's name in lower case; those that load come first, ranks in their order."""
    replicas: dict[tuple[str, str], Replica] = {}
    sizes: dict[str, int] = {}
    for record in sorted(records, key=lambda one: (one.key.worker_rank, one.key.worker_id)):
        known = names[record.key]
        name = known.replica or record.key.worker_id
        key = record.model_name.lower(), name
        if (replica := replicas.get(key)) is None:
            replica = replicas[key] = Replica(name, record.model_name, bool(known.replica), known.pod, known.node)
        replica.ranks.append(record)
        if record.key.source_id not in sizes:
            sizes[record.key.source_id] = _size(record)
    found: dict[str, list[Replica]] = defaultdict(list)
    for (model, _), replica in replicas.items():
        replica.state = _state(replica, sizes)
        found[model].append(replica)
    for of_model in found.values():
        of_model.sort(key=lambda one: (STATE_ORDER[one.state], one.pod or one.name, one.name))
    return found


def _size(record: SourceRecord) -> int:
    """How many ranks an engine with these weights has at least."""
    identity = p2p_pb2.SourceIdentity.FromString(record.identity)
    return max(1, identity.tensor_parallel_size) * max(1, identity.pipeline_parallel_size)


def _state(replica: Replica, sizes: dict[str, int]) -> State:
    """Ready when all ranks of one of its offers are; an engine may offer its weights raw and processed."""
    by_source: dict[str, Counter[int]] = defaultdict(Counter)
    for record in replica.ranks:
        by_source[record.key.source_id][record.status] += 1
    for source, states in by_source.items():
        wanted = sizes[source] if replica.told else 1
        if states[_READY] >= wanted and not states[_INITIALIZING]:
            return "ready"
    states = sum(by_source.values(), Counter())
    if states[_INITIALIZING]:
        return "initializing"
    return "incomplete" if states[_READY] else "stale"


def _rank(record: SourceRecord, now_ms: int) -> Json:
    worker = record_pb2.WorkerFacts.FromString(record.worker)
    origin = worker.digest_origin
    return {
        "source_id": record.key.source_id,
        "worker_id": record.key.worker_id,
        "worker_rank": record.key.worker_rank,
        "state": STATES.get(record.status, "unknown"),
        "pod": worker.pod_name,
        "node": worker.node_name,
        "accelerator": record.accelerator,
        "endpoint": record.endpoint,
        "source_load": record.source_load,
        "epoch": record.epoch,
        "digest_origin": mx_pb2.DigestOrigin.Name(origin).removeprefix("DIGEST_ORIGIN_").lower()
        if origin in mx_pb2.DigestOrigin.values()
        else "unknown",
        "received_from": list(worker.received_from),
        "signed_manifest": worker.signed_manifest,
        "silent_seconds": max(0.0, (now_ms - record.updated_at_ms) / 1000),
    }


def source_as_json(source_id: str, records: list[SourceRecord]) -> Json:
    """What is loaded under one source id, and by how many workers."""
    identity = p2p_pb2.SourceIdentity.FromString(records[0].identity)
    states = Counter(STATES[record.status] for record in records if record.status in STATES)
    framework = identity.backend_framework
    return {
        "source_id": source_id,
        "revision": identity.revision,
        "dtype": identity.dtype,
        "quantization": identity.quantization,
        "tensor_parallel_size": identity.tensor_parallel_size,
        "pipeline_parallel_size": identity.pipeline_parallel_size,
        "expert_parallel_size": identity.expert_parallel_size,
        "framework": p2p_pb2.BackendFramework.Name(framework).removeprefix("BACKEND_FRAMEWORK_").lower()
        if framework in p2p_pb2.BackendFramework.values()
        else "unknown",
        "layout": identity.extra_parameters.get("layout", ""),
        **{state: states.get(state, 0) for state in STATES.values()},
        "workers_total": len(records),
    }
