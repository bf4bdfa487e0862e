"""Records in Redis, for several servers over one Redis.

Every operation is one Lua script (`redis_scripts`), so it is atomic for all replicas. Leases are judged by a clock that
is kept in Redis and shared by all replicas. It stops while no heartbeat could arrive, so that an outage of Redis or of
all servers makes no worker STALE.

What was published does not change while its epoch stays the same: each replica caches it, and searches carry only
what changes. With `appendonly yes` and `appendfsync always` Redis keeps what it has acknowledged across a kill or a
power cut; with other settings the server logs a warning.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mxserver.limits import DEFAULT, ServerLimits
from mxserver.store.batch import CLOCK_SET_BACK_MS
from mxserver.store.clock import Clock
from mxserver.store.errors import StoreUnavailable
from mxserver.store.index import STALE, never_given, not_owner, stale_epoch, unknown
from mxserver.store.interface import Leases, Publication, Query, RecordKey, SourceRecord, SourceStore, Status
from mxserver.store.redis import redis_scripts as scripts
from mxserver.store.redis.large_values import PART_BYTES, WHOLE, LargeValues, Written
from mxserver.store.redis.redis_link import RedisLink
from mxserver.store.redis.redis_turns import RedisTurns
from mxserver.store.redis.redis_updates import Update, Updates
from mxserver.store.stored_amount import LARGE_BYTES, full, small_part
from mxserver.wire.proto import p2p_pb2, record_pb2

_LOG = logging.getLogger(__name__)

PREFIX = "mx:"
LONGEST_STEP_SECONDS = 3.0  # servers advance the clock every second; a longer gap is an outage
LINGER_SECONDS = 0.1  # how long a heartbeat waits for others; hundreds a second then cost ten writes
RECORDS_PER_SCRIPT = 500  # limits how long one script blocks Redis: a few milliseconds
KNOWN_PAYLOAD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Payload:
    """What was published with one epoch."""

    identity: bytes
    worker: bytes
    model_name: str
    accelerator: str
    topology: dict[str, str]
    endpoint: str
    published_bytes: int
    is_cut: bool = False  # of `worker` there is only what the server reads

    @classmethod
    def parse(cls, identity: bytes, worker: bytes, published_bytes: int, *, is_cut: bool = False) -> _Payload:
        if len(worker) > LARGE_BYTES:
            worker, is_cut = small_part(worker), True
        metadata = record_pb2.WorkerFacts.FromString(worker)
        model_name = p2p_pb2.SourceIdentity.FromString(identity).model_name
        topology, endpoint = dict(metadata.topology), metadata.worker_grpc_endpoint
        return cls(identity, worker, model_name, metadata.accelerator, topology, endpoint, published_bytes, is_cut)

    @property
    def size_bytes(self) -> int:
        return len(self.identity) + len(self.worker) + 1000  # the objects around them


class _Payloads:
    """A cache of recently used payloads, by record and epoch, up to a number of bytes. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._known: OrderedDict[bytes, tuple[int, _Payload]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: bytes, epoch: int) -> _Payload | None:
        with self._lock:
            known = self._known.get(name)
            if known is None or known[0] != epoch:
                return None
            self._known.move_to_end(name)
            return known[1]

    def put(self, name: bytes, epoch: int, payload: _Payload) -> None:
        with self._lock:
            old = self._known.pop(name, None)
            if old is not None:
                self._bytes -= old[1].size_bytes
                if old[0] > epoch:
                    epoch, payload = old
            self._known[name] = epoch, payload
            self._bytes += payload.size_bytes
            while self._bytes > self._most_bytes:
                self._bytes -= self._known.popitem(last=False)[1][1].size_bytes


class _Row(NamedTuple):
    """What a script says about a record, as bytes; identity and worker only where they were asked for."""

    name: bytes
    status: bytes
    epoch: bytes
    life: bytes
    updated_at: bytes
    load: bytes
    owner: bytes
    model: bytes
    identity: bytes = b""
    worker: bytes = b""
    is_cut: bytes = b""
    published_bytes: bytes = b"0"


class RedisStore(SourceStore):
    """Records in the Redis at a URL. Several servers may use it at the same time."""

    def __init__(
        self,
        url: str,
        leases: Leases | None = None,
        clock: Clock | None = None,
        *,
        prefix: str = PREFIX,
        linger_seconds: float = LINGER_SECONDS,
        limits: ServerLimits = DEFAULT,
    ) -> None:
        """`clock` is for tests; without it Redis' own time counts. Updates wait `linger_seconds` for others.

        Raises StoreUnusable and SettingError.
        """
        self._link = RedisLink(url)
        self._clock = clock
        self._limits = limits
        self._replica = secrets.token_hex(8)
        self._payloads = _Payloads(KNOWN_PAYLOAD_BYTES)
        self._large = LargeValues(self._link, prefix)
        self._closed = False
        leases = leases or Leases()
        step_seconds = min(LONGEST_STEP_SECONDS, leases.heartbeat_seconds / 2)
        self._fixed = (prefix, _ms(leases.heartbeat_seconds), _ms(leases.collect_seconds), _ms(step_seconds))
        self._silence = _ms(2 * step_seconds)
        try:
            self._link.require_usable()
            self._join()
        except BaseException:
            self._link.close()
            raise
        self._updates = Updates(self._keep_updates, linger_seconds)
        self.turns = RedisTurns(self._run)
        if not self._link.is_lasting():
            _LOG.warning(
                "Redis at %s may lose what it has acknowledged when it ends: set appendonly yes and appendfsync always",
                self._link.place,
            )

    def publish(self, publication: Publication) -> SourceRecord:
        if len(publication.worker) <= PART_BYTES:
            return self._publish(publication, publication.worker, WHOLE)
        self._ask_to_publish(publication, b"", WHOLE._replace(bytes=len(publication.worker)), only_asks=True)
        with self._large.written(publication.worker) as written:
            return self._publish(publication, b"", written)

    def _publish(self, publication: Publication, worker: bytes, written: Written) -> SourceRecord:
        row = _Row(*self._ask_to_publish(publication, worker, written))
        payload = _Payload(
            publication.identity,
            publication.worker,
            publication.model_name,
            publication.accelerator,
            dict(publication.topology),
            publication.endpoint,
            len(publication.identity) + len(publication.worker),
        )
        is_large = len(publication.worker) > LARGE_BYTES
        kept = replace(payload, worker=small_part(publication.worker), is_cut=True) if is_large else payload
        self._payloads.put(row.name, int(row.epoch), kept)
        return _record(row, payload)

    def _ask_to_publish(
        self, publication: Publication, worker: bytes, written: Written, *, only_asks: bool = False
    ) -> Sequence[bytes]:
        """The record's row, unless it only asks whether the record would be taken."""
        key = publication.key
        outcome, *details = self._run(
            scripts.PUBLISH,
            _name(key),
            key.source_id,
            _worker(key.source_id, key.worker_id),
            publication.model_name.lower(),
            str(publication.status),
            str(publication.epoch),
            publication.owner,
            publication.identity,
            worker,
            *(str(most) for most in (self._limits.records, self._limits.records_per_worker, self._limits.stored_bytes)),
            str(CLOCK_SET_BACK_MS),
            small_part(publication.worker) if len(publication.worker) > LARGE_BYTES else b"",
            written.token,
            str(written.parts),
            str(written.bytes),
            "1" if only_asks else "",
        )
        self._require_ok(outcome, details, key, publication.epoch, publication.owner)
        return details[0] if details else ()

    def update_status(
        self, key: RecordKey, status: Status, *, epoch: int = 0, source_load: float | None = None, owner: str = ""
    ) -> None:
        load = "" if source_load is None else repr(source_load)
        outcome, *details = self._updates.submit((_name(key), str(status), str(epoch), load, owner))
        self._require_ok(outcome, details, key, epoch, owner)

    def get(self, source_id: str, worker_id: str) -> SourceRecord | None:
        records = self._records(self._run(scripts.OF_WORKER, _worker(source_id, worker_id)))
        return min(records, key=lambda record: record.key.worker_rank, default=None)

    def whole_worker(self, record: SourceRecord) -> bytes | None:
        if not record.worker_is_cut:
            return record.worker
        found = self._run(scripts.METADATA, _name(record.key), str(record.epoch))
        if found is None:
            return None
        inline, token = found
        if not token:
            whole: bytes = inline
            return whole
        return self._large.read(token.decode(), record.payload_bytes - len(record.identity))

    def find(self, query: Query) -> list[SourceRecord]:
        if query.source_id == "" or query.model_name == "":
            return []  # no record has such a name; the scripts treat an empty name as missing
        source, model = query.source_id or "", (query.model_name or "").lower()
        wanted = (query.status, query.worker_rank, query.min_updated_at_ms)
        filters = [model, *("" if value is None else str(value) for value in wanted)]
        few = query.limit is not None and query.limit <= RECORDS_PER_SCRIPT and query.status not in (None, STALE)
        if source and few:
            rows = self._run(scripts.FIND, source, *filters, str(query.limit))
        else:
            rows = []
            for names in self._names(source, model, *filters[1:3]):
                rows += self._run(scripts.FITTING, *filters, *names)
        # Records that had to be fetched are as new as the fetch.
        records = [record for record in self._records(rows) if query.status in (None, record.status)]
        records.sort(key=_age_order, reverse=True)
        return records if query.limit is None else records[: query.limit]

    def sweep(self) -> tuple[int, int]:
        stale = gone = 0
        while True:
            more_stale, more_gone, looked_at = self._run(scripts.SWEEP, self._replica, str(RECORDS_PER_SCRIPT))
            stale += more_stale
            gone += more_gone
            if looked_at < RECORDS_PER_SCRIPT:
                return stale, gone

    def check(self) -> None:
        self._updates.require_working()
        self._run(scripts.CHECK)

    def close(self) -> None:
        if self._closed:
            return
        self._updates.close()
        self._closed = True
        try:
            self._link.run(scripts.LEAVE, *self._arguments(), self._replica)
        except StoreUnavailable as error:
            _LOG.info("left without a goodbye reason=%s", error)
        self._link.close()

    def _join(self) -> None:
        """Registers this replica. The first replica after a time without any renews all leases."""
        if self._run(scripts.JOIN, self._replica, self._silence):
            for names in self._names("", ""):
                self._run(scripts.RENEW, *names)

    def _names(self, source: str, model: str, status: str = "", rank: str = "") -> Iterator[list[bytes]]:
        """Names of records, each once, some hundred at a time: those of a source, else of a model, else all.

        With a `status` or a `rank`, not many that do not fit; of all, those too.
        """
        if source:
            several = iter([self._run(scripts.NAMES, source, status, rank)])
        elif model:
            sources: Sequence[bytes] = self._run(scripts.SOURCES_OF_MODEL, model)
            several = (self._run(scripts.NAMES, each, status, rank) for each in sources)
        else:
            several = self._link.names(f"{self._fixed[0]}due", RECORDS_PER_SCRIPT)  # which has all of them
        known: set[bytes] = set()
        for found in several:
            names = list(dict.fromkeys(name for name in found if name not in known))
            known.update(names)
            for start in range(0, len(names), RECORDS_PER_SCRIPT):
                yield names[start : start + RECORDS_PER_SCRIPT]

    def _keep_updates(self, updates: Sequence[Update]) -> Sequence[Any]:
        answers: Sequence[Any] = self._run(scripts.UPDATE, *(argument for update in updates for argument in update))
        return answers

    def _run(self, script: str, *arguments: str | bytes) -> Any:
        if self._closed:
            raise StoreUnavailable("the store is closed: the server is shutting down")
        return self._link.run(script, *self._arguments(), *arguments)

    def _arguments(self) -> tuple[str, ...]:
        if self._clock is None:
            return (*self._fixed, "", "")
        return (*self._fixed, _ms(self._clock.monotonic_seconds()), str(self._clock.unix_ms()))

    def _require_ok(self, outcome: bytes, details: Sequence[Any], key: RecordKey, epoch: int, owner: str) -> None:
        if outcome == b"unknown":
            raise unknown(key)
        if outcome == b"epoch":
            raise stale_epoch(key, epoch, int(details[0]))
        if outcome == b"never":
            raise never_given(key, epoch, int(details[0]))
        if outcome == b"owner":
            raise not_owner(key, owner)
        if outcome == b"parts":
            raise StoreUnavailable("parts of the metadata have ended before it was whole; publish it again")
        if outcome == b"full":
            raise full(self._limits, details[0].decode())

    def _records(self, rows: Iterable[Sequence[bytes]]) -> list[SourceRecord]:
        """Adds the published payloads. Those that this replica has not cached are fetched."""
        records, missing = [], []
        for row in (_Row(*parts) for parts in rows):
            payload = self._payloads.get(row.name, int(row.epoch))
            if payload is None:
                missing.append(row.name)
            else:
                records.append(_record(row, payload))
        for start in range(0, len(missing), RECORDS_PER_SCRIPT):
            for row in (_Row(*p) for p in self._run(scripts.ROWS, *missing[start : start + RECORDS_PER_SCRIPT])):
                payload = _Payload.parse(row.identity, row.worker, int(row.published_bytes), is_cut=bool(row.is_cut))
                self._payloads.put(row.name, int(row.epoch), payload)
                records.append(_record(row, payload))
        return records


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))


def _worker(source_id: str, worker_id: str) -> bytes:
    """Joins two names without ambiguity: the first one's length comes first."""
    source = source_id.encode()
    return b"%d:%s%s" % (len(source), source, worker_id.encode())


def _name(key: RecordKey) -> bytes:
    return b"%d:%s" % (key.worker_rank, _worker(key.source_id, key.worker_id))


def _key(name: bytes) -> RecordKey:
    rank, length, names = name.split(b":", 2)
    source_bytes = int(length)
    return RecordKey(names[:source_bytes].decode(), names[source_bytes:].decode(), int(rank))


def _record(row: _Row, payload: _Payload) -> SourceRecord:
    load = float(row.load) if row.load else None
    return SourceRecord(
        key=_key(row.name),
        status=p2p_pb2.SourceStatus.ValueType(int(row.status)),
        epoch=int(row.epoch),
        life=int(row.life),
        updated_at_ms=int(row.updated_at),
        identity=payload.identity,
        worker=payload.worker,
        model_name=payload.model_name,
        accelerator=payload.accelerator,
        topology=payload.topology,
        endpoint=payload.endpoint,
        source_load=load if load is None or math.isfinite(load) else None,
        owner=row.owner.decode(),
        payload_bytes=payload.published_bytes,
        worker_is_cut=payload.is_cut,
    )


def _age_order(record: SourceRecord) -> tuple[int, bytes]:
    """Orders records with equal times as the index does, so that a limit cuts the same list."""
    return record.updated_at_ms, _name(record.key)
