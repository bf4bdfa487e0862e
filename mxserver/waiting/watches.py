"""The streams of workers that wait or receive: each hears what changes for its weights and rank.

One thread looks at the records of each (source, rank) that somebody watches: soon after this server was told of a
change, and every second, because leases end by themselves and another replica may have been told. It rests after each
look by what the look took (SHARE_OF_A_CORE). A worker that several changes happen to meanwhile hears of them at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import grpc

from mxserver.limits import DEFAULT, ServerLimits
from mxserver.periodic import Periodic
from mxserver.store import Query, RecordKey, SourceRecord, SourceStore, StoreUnavailable
from mxserver.waiting.elections import ElectionKey, StorageElections
from mxserver.waiting.nearest import nearest, reference
from mxserver.wire import MxError
from mxserver.wire.proto import mx_pb2, p2p_pb2, watch_pb2

__all__ = ["TooManyWatches", "Watches"]

_LOG = logging.getLogger(__name__)

_READY = p2p_pb2.SOURCE_STATUS_READY
_INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING

LOOK_SECONDS = 1.0
SHARE_OF_A_CORE = 0.25
UNREAD_SECONDS = 30.0
"""A stream whose last message was not taken for so long ends: its reader asks anew, if it is there."""
ASKED_SECONDS = 2.0
"""So long the worker that was told to ask for the turn has for that, before another one is told."""

_MOST_SOURCES = 32  # of each status, in one message
_CHOSEN_FROM = 256  # the newest ones
_INITIALIZING_LOOKED_AT = 2048  # most of those that start serve nothing
_MOST_DOUBTS = 8


class TooManyWatches(MxError):
    """As many streams are open as may be."""

    code = "MX_TOO_MANY_WATCHES"


class Stream(Protocol):
    """What a watch needs of an open stream (mxserver.calls.PushedStream)."""

    @property
    def unread_seconds(self) -> float: ...

    def push(self, message: bytes) -> None: ...

    def end(self, status: grpc.StatusCode, reason: str) -> None: ...

    def cut(self) -> None: ...


@dataclass(eq=False)
class _Watch:
    """One worker that is told; `sent` is its last message."""

    request: watch_pb2.WatchSourcesRequest
    client: str
    stream: Stream | None = None
    told: bytes | None = None  # what it was told of sources
    sent: bytes | None = None
    ended: bool = False

    @property
    def most(self) -> int:
        return min(self.request.limit or _MOST_SOURCES, _MOST_SOURCES)


class _Seen(NamedTuple):
    ready: list[tuple[RecordKey, int]]
    doubts: list[bytes]
    receiving: list[tuple[RecordKey, int]]


class _Asked(NamedTuple):
    watch: _Watch
    until: float  # monotonic seconds


@dataclass
class _Group:
    """All that watch one (source, rank). `statuses` are those of the last look, by worker."""

    watches: dict[_Watch, None] = field(default_factory=dict)  # an ordered set
    statuses: dict[str, p2p_pb2.SourceStatus.ValueType] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)  # by domain, who was told to ask for the turn
    seen: _Seen | None = None  # what the last look found


class Watches:
    """Thread-safe. `start` once, `stop` at the end; `drain` ends all streams, and no new one begins."""

    def __init__(
        self,
        store: SourceStore,
        elections: StorageElections,
        doubts: Callable[[str], list[mx_pb2.Doubt]],
        limits: ServerLimits = DEFAULT,
    ) -> None:
        self._store, self._elections, self._doubts, self._limits = store, elections, doubts, limits
        self._lock = threading.Lock()
        self._groups: dict[tuple[str, int], _Group] = {}
        self._changed_groups: dict[tuple[str, int], None] = {}
        self._of_client: Counter[str] = Counter()
        self._drains = False
        self._all_looked_at = 0.0  # monotonic seconds
        self._looker = Periodic("watches", LOOK_SECONDS, self._look_at_changed, share=SHARE_OF_A_CORE)

    @property
    def problem(self) -> str | None:
        """Why workers are told nothing; None if they are."""
        return self._looker.problem

    @property
    def open_streams(self) -> int:
        """How many there are."""
        with self._lock:
            return self._of_client.total()

    def start(self) -> None:
        """Call once."""
        self._looker.start()

    def stop(self) -> None:
        """Ends all streams. Idempotent."""
        self.drain()
        self._looker.stop()

    def drain(self) -> None:
        """Ends all streams, so that their workers go to another server; new ones are refused. Idempotent."""
        with self._lock:
            self._drains = True
            streams = [watch.stream for group in self._groups.values() for watch in group.watches]
        for stream in streams:
            if stream is not None:
                stream.end(grpc.StatusCode.UNAVAILABLE, "the server is draining; open the stream at another one")

    def begin(
        self, request: watch_pb2.WatchSourcesRequest, client: str, open_stream: Callable[[Callable[[], None]], Stream]
    ) -> None:
        """Begins to tell a worker; `open_stream` makes its stream, of a function that is called at its end.

        Raises TooManyWatches.
        """
        watch = _Watch(request, client)
        key = (request.mx_source_id, request.worker_rank)
        with self._lock:
            if self._drains:
                raise TooManyWatches("the server is draining; open the stream at another one")
            for name, open_now in (
                ("watches", self._of_client.total()),
                ("watches_per_client", self._of_client[client]),
            ):
                if open_now >= getattr(self._limits, name):
                    raise TooManyWatches(self._limits.refusal(name, f"{open_now} streams of {client} are open"))
            self._of_client[client] += 1
        watch.stream = open_stream(lambda: self._end(key, watch))
        with self._lock:
            if not watch.ended:
                self._groups.setdefault(key, _Group()).watches[watch] = None
                self._changed_groups[key] = None
        self._looker.wake()

    def _end(self, key: tuple[str, int], watch: _Watch) -> None:
        with self._lock:
            if watch.ended:
                return
            watch.ended = True
            self._of_client[watch.client] -= 1
            if not self._of_client[watch.client]:
                del self._of_client[watch.client]
            group = self._groups.get(key)
            if group is None or watch not in group.watches:
                return
            del group.watches[watch]
            if not group.watches:
                del self._groups[key]
            asked = group.asked.get(watch.request.domain)
            if asked is not None and asked.watch is watch:
                group.asked.pop(watch.request.domain, None)
                self._changed_groups[key] = None
                self._looker.wake()

    def changed(self, source_id: str, rank: int) -> None:
        """Something is new of these weights and rank."""
        key = (source_id, rank)
        with self._lock:
            if key not in self._groups:
                return
            self._changed_groups[key] = None
        self._looker.wake()

    def record_changed(self, key: RecordKey, status: p2p_pb2.SourceStatus.ValueType | None) -> None:
        """A record was published (without a status), or its status was told again; most of these are heartbeats."""
        group = self._groups.get((key.source_id, key.worker_rank))
        if group is not None and (status is None or group.statuses.get(key.worker_id, _INITIALIZING) != status):
            self.changed(key.source_id, key.worker_rank)

    def _look_at_changed(self) -> None:
        """Changes of one group cost no look at all others; those are looked at every second."""
        if time.monotonic() - self._all_looked_at >= LOOK_SECONDS / 2:
            self.look()
            return
        with self._lock:
            changed, self._changed_groups = self._changed_groups, {}
        self._look_at(changed)

    def look(self) -> None:
        """Tells everybody what is new. Called by one thread."""
        self._all_looked_at = time.monotonic()
        with self._lock:
            changed, self._changed_groups = self._changed_groups, {}
            keys = list({**changed, **dict.fromkeys(self._groups)})
        self._look_at(keys)

    def _look_at(self, keys: Iterable[tuple[str, int]]) -> None:
        with self._lock:
            groups = [(key, self._groups[key]) for key in keys if key in self._groups]
        for key, group in groups:
            try:
                self._look(key, group)
            except StoreUnavailable as error:  # readiness tells of it, and the next look may work
                _LOG.debug("watched records cannot be read reason=%s", error)
                return

    def _look(self, key: tuple[str, int], group: _Group) -> None:
        source_id, rank = key
        ready = self._store.find(Query(source_id, status=_READY, worker_rank=rank, limit=_CHOSEN_FROM))
        starting = self._store.find(
            Query(source_id, status=_INITIALIZING, worker_rank=rank, limit=_INITIALIZING_LOOKED_AT)
        )
        receiving = [record for record in starting if record.endpoint][:_CHOSEN_FROM]
        doubts = self._doubts(source_id)[:_MOST_DOUBTS]
        group.statuses = {record.key.worker_id: record.status for record in (*ready, *starting)}
        with self._lock:
            watches = list(group.watches)
        seen = _Seen(_facts(ready), [doubt.SerializeToString() for doubt in doubts], _facts(receiving))
        before, group.seen = group.seen, seen
        is_new = before is None or seen != before
        is_new_to_waiting = before is None or seen[:2] != before[:2]  # who receives is no source to wait for
        readers = {domain: self._whose_turn(key, group, domain) for domain in {w.request.domain for w in watches}}
        now = _Now(ready, receiving, doubts)
        for watch in watches:
            stream = watch.stream
            if stream is None:
                continue
            if stream.unread_seconds > UNREAD_SECONDS:
                _LOG.warning("watch ended worker=%s: nothing of it was taken for long", watch.request.worker_id)
                stream.cut()
                continue
            reader, asked, everybody = readers[watch.request.domain]
            if watch.told is None or (is_new_to_waiting if watch.request.wants_turn else is_new):
                watch.told = now.told_to(watch)
            elif not watch.request.wants_turn:
                continue
            turn = watch_pb2.SourcesNow(reader_worker_id=reader, ask_turn=everybody or asked is watch)
            message = watch.told + turn.SerializeToString()  # two messages one after the other are one
            if message != watch.sent:
                watch.sent = message
                stream.push(message)

    def _whose_turn(self, key: tuple[str, int], group: _Group, domain: str) -> tuple[str, _Watch | None, bool]:
        """Who reads storage; if nobody does, the worker that is to ask for that; and whether all are to ask."""
        reader, everybody = self._elections.state(ElectionKey(*key, domain))
        if reader or everybody:
            group.asked.pop(domain, None)
            return reader, None, everybody
        now = time.monotonic()
        asked = group.asked.get(domain)
        if asked is not None and now < asked.until and not asked.watch.ended:
            return "", asked.watch, False
        with self._lock:
            waiting = [w for w in group.watches if w.request.domain == domain and w.request.wants_turn]
            if not waiting:
                return "", None, False
            chosen = waiting[0]
            group.watches.pop(chosen)  # comes last from now on
            group.watches[chosen] = None
        group.asked[domain] = _Asked(chosen, now + ASKED_SECONDS)
        return "", chosen, False


class _Told:
    """A record, and the message of it alone."""

    def __init__(self, record: SourceRecord, message: watch_pb2.SourcesNow) -> None:
        self.record, self.message = record, message.SerializeToString()


class _Now:
    """What there is of one (source, rank), and what of it each worker is told."""

    def __init__(self, ready: list[SourceRecord], receiving: list[SourceRecord], doubts: list[mx_pb2.Doubt]) -> None:
        # Each as a message of its own: several, one after the other, are one. Hundreds of watches share them.
        self._ready = {r.key: _Told(r, watch_pb2.SourcesNow(ready=[reference(r)])) for r in ready}
        self._receiving = {r.key: _Told(r, watch_pb2.SourcesNow(receiving=[reference(r)])) for r in receiving}
        self._doubts = watch_pb2.SourcesNow(doubts=doubts).SerializeToString()

    def told_to(self, watch: _Watch) -> bytes:
        """The message without what is said of turns."""
        return b"".join([*_chosen(self._ready, watch), *_chosen(self._receiving, watch), self._doubts])


def _chosen(messages: dict[RecordKey, _Told], watch: _Watch) -> list[bytes]:
    """Those of the records that this one is told of."""
    asker = watch.request
    records = [told.record for key, told in messages.items() if key.worker_id != asker.worker_id]
    found = nearest(records, asker.worker_id, asker.topology, asker.levels, watch.most)
    return [messages[record.key].message for record in found]


def _facts(records: list[SourceRecord]) -> list[tuple[RecordKey, int]]:
    """What of the records is told at once: loads and heartbeats are not."""
    return sorted((record.key, record.epoch) for record in records)
