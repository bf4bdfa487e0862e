"""Models for the status page: the sums of each, and the details of those that somebody looks at."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mxserver.store import RecordKey, SourceRecord
from mxserver.telemetry import FinishedLoad, LoadHistory, RunningLoad
from mxserver.web.replicas import STATE_ORDER, Names, Replica, folded, source_as_json
from mxserver.web.rollouts import ROLLOUT_GAP_SECONDS, ReplicaLoad, Rollout, feeds, rollouts, sums

Json = dict[str, Any]

WANTED_SECONDS = 3600.0
"""How long after a rollout as many replicas count as wanted as took part in it."""

LISTED_SOURCES = 50
LISTED_ROLLOUTS = 8
LISTED_GIVERS = 20


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """What is asked for beside the sums.

    `models` and `sources` (ids) are those whose details are wanted, `replicas` and `bars` how many of each at most,
    `ranks` the replicas whose ranks are listed ("*": all), `search` what models and replicas have to have in a name,
    `loads` how many running loads are listed at the top.
    """

    models: tuple[str, ...] = ()
    sources: frozenset[str] = frozenset()
    replicas: int = 20
    ranks: frozenset[str] = frozenset()
    bars: int = 40
    search: str = ""
    loads: int = 100


class ModelHistory(NamedTuple):
    """The kept loads of one model, newest first, and what follows from them."""

    revision: int
    loads: Sequence[FinishedLoad]
    rollouts: Sequence[Rollout]
    sums: Json


class Histories:
    """The history of each model, computed again only when it has changed. Thread-safe."""

    def __init__(self, history: LoadHistory) -> None:
        self._history = history
        self._lock = threading.Lock()
        self._known: dict[str, ModelHistory] = {}

    def all(self) -> dict[str, ModelHistory]:
        """By the model's name in lower case."""
        with self._lock:
            self._known = {name: self._one(name, revision) for name, revision in self._history.models().items()}
            return dict(self._known)

    def _one(self, name: str, revision: int) -> ModelHistory:
        before = self._known.get(name)
        if before is not None and before.revision == revision:
            return before
        loads = self._history.of(name)
        since = min((load.at_ms for load in loads), default=0)
        return ModelHistory(revision, loads, rollouts(loads), {"loads": len(loads), "since_ms": since, **sums(loads)})


@dataclass(slots=True)
class Model:
    """One model as it is now."""

    name: str
    replicas: list[Replica] = field(default_factory=list)
    sources: dict[str, list[SourceRecord]] = field(default_factory=dict)
    running: list[RunningLoad] = field(default_factory=list)
    history: ModelHistory | None = None

    def wanted(self, now_ms: int) -> int:
        """How many replicas there should be, as nobody says it: those that live, or those of the last rollout."""
        living = sum(replica.state != "stale" for replica in self.replicas)
        last = self.history.rollouts[0] if self.history and self.history.rollouts else None
        if last is None or now_ms - last.at_ms > 1000 * WANTED_SECONDS:
            return living
        return max(living, len(last.counted_as))

    def as_json(self, now_ms: int) -> Json:
        states = Counter(replica.state for replica in self.replicas)
        last = self.history.rollouts[0] if self.history and self.history.rollouts else None
        return {
            "model_name": self.name,
            "sources": len(self.sources),
            "workers": sum(map(len, self.sources.values())),
            "replicas": {**{state: states[state] for state in STATE_ORDER}, "wanted": self.wanted(now_ms)},
            "loading": _loading(self.running) if self.running else None,
            "last_rollout": last.as_json() if last else None,
            "history": self.history.sums if self.history else {"loads": 0, "since_ms": 0, **sums(())},
        }


def _loading(running: Sequence[RunningLoad]) -> Json:
    rates = [load.bytes_per_second for load in running if load.bytes_per_second is not None]
    done, total = sum(load.bytes_done for load in running), sum(load.bytes_total for load in running)
    rate = sum(rates) if rates else None
    return {
        "loads": len(running),
        "bytes_done": done,
        "bytes_total": total,
        "bytes_per_second": rate,
        "eta_seconds": max(0, total - done) / rate if rate else None,
        "running_seconds": max(load.running_seconds for load in running),
        "silent_seconds": max(load.silent_seconds for load in running),
    }


class Fleet:
    """What the records of one moment are together."""

    def __init__(self, records: Sequence[SourceRecord], names: Mapping[RecordKey, Names]) -> None:
        self.names = names
        self.replicas = folded(records, names)
        self.replica_of = {
            record.key.worker_id: replica.name
            for of in self.replicas.values()
            for replica in of
            for record in replica.ranks
        }
        self.model_of = {record.key: record.model_name for record in records}
        self.sources: dict[str, dict[str, list[SourceRecord]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            self.sources[record.model_name.lower()][record.key.source_id].append(record)
        self.of_source = {source: model for model, of in self.sources.items() for source in of}


class Models:
    """All models at one moment."""

    def __init__(self, fleet: Fleet, running: Sequence[RunningLoad], histories: Mapping[str, ModelHistory]) -> None:
        self._fleet = fleet
        self._models = {
            key: Model(replicas[0].model_name, replicas, dict(sorted(fleet.sources[key].items())))
            for key, replicas in fleet.replicas.items()
        }
        for load in running:
            name = fleet.model_of.get(load.key, "")
            self._models.setdefault(name.lower(), Model(name)).running.append(load)
        for model, history in histories.items():
            name = history.loads[0].model_name if history.loads else model
            self._models.setdefault(model, Model(name)).history = history

    def model_name(self, load: RunningLoad) -> str:
        """Of a load that runs; empty where no record has it."""
        return self._fleet.model_of.get(load.key, "")

    def of_workers(self) -> int:
        """How many have records."""
        return sum(bool(model.sources) for model in self._models.values())

    def names_of(self, load: RunningLoad) -> tuple[str, str]:
        """The replica and the pod of a load that runs."""
        names = self._fleet.names.get(load.key)
        return (names.replica or load.key.worker_id, names.pod) if names else (load.key.worker_id, "")

    def all(self) -> list[Model]:
        return list(self._models.values())

    def found(self, search: str) -> dict[str, Model]:
        """The models that have this text in a name, or a replica that has it, by name in lower case, sorted."""
        text = search.strip().lower()
        return {
            key: model
            for key, model in sorted(self._models.items())
            if not text or text in key or any(replica.matches(text) for replica in model.replicas)
        }

    def asked(self, query: StatusQuery) -> list[str]:
        """Those whose details are wanted, in lower case, none twice."""
        names = [name.lower() for name in query.models]
        of_source = self._fleet.of_source
        names += [of_source[source] for source in sorted(query.sources) if source in of_source]
        return [name for name in dict.fromkeys(names) if name in self._models]

    def details(self, key: str, query: StatusQuery, now_ms: int) -> Json:
        """What there is of one model beside its sums; `left_out` counts what is not listed."""
        model, text = self._models[key], query.search.strip().lower()
        sources = {id_: of for id_, of in model.sources.items() if not query.sources or id_ in query.sources}
        replicas = [
            replica
            for replica in model.replicas
            if (not text or replica.matches(text))
            and (not query.sources or any(record.key.source_id in sources for record in replica.ranks))
        ]
        runs = model.history.rollouts if model.history else ()
        last = runs[0] if runs else None
        bars = [bar for bar in (last.replicas if last else ()) if not text or _bar_matches(bar, text, key)]
        shown = sorted(sorted(bars, key=lambda bar: -bar.ready_seconds)[: query.bars], key=lambda bar: bar.began_ms)
        replica_of = self._replica_of(model)
        named = {replica.name: replica.pod for replica in model.replicas}
        named |= {bar.name: bar.pod for run in runs[:1] for bar in run.replicas}
        given, givers_left = feeds(last.loads if last else (), model.running, replica_of, named, LISTED_GIVERS)
        loading = self._loading_replicas(model)
        return {
            "sources": [source_as_json(id_, of) for id_, of in list(sources.items())[:LISTED_SOURCES]],
            "replicas": [
                replica.as_json(now_ms, with_ranks="*" in query.ranks or replica.name in query.ranks)
                for replica in replicas[: query.replicas]
            ],
            "replicas_total": len(replicas),
            "rollouts": [run.as_json() for run in runs[:LISTED_ROLLOUTS]],
            "bars": [bar.as_json() for bar in shown],
            "bars_total": len(bars),
            "feeds": given,
            "loading": loading[: query.bars],
            "rollout_gap_seconds": ROLLOUT_GAP_SECONDS,
            "left_out": {
                "sources": max(0, len(sources) - LISTED_SOURCES),
                "replicas": max(0, len(replicas) - query.replicas),
                "rollouts": max(0, len(runs) - LISTED_ROLLOUTS),
                "bars": len(bars) - len(shown),
                "givers": givers_left,
                "loading": max(0, len(loading) - query.bars),
            },
        }

    def _loading_replicas(self, model: Model) -> list[Json]:
        """The loads that run, those of one replica together; the longest-running first."""
        of: dict[tuple[str, str], list[RunningLoad]] = defaultdict(list)
        for load in model.running:
            of[self.names_of(load)].append(load)
        found = [
            {"replica": name, "pod": pod, "ranks": len(loads), "path": loads[0].path, **_loading(loads)}
            for (name, pod), loads in of.items()
        ]
        return sorted(found, key=lambda one: -one["running_seconds"])

    def _replica_of(self, model: Model) -> dict[str, str]:
        """Replicas by worker id: of those that have records, and those whose loads are kept."""
        past = {load.key.worker_id: load.replica for load in model.history.loads} if model.history else {}
        return past | self._fleet.replica_of


def _bar_matches(bar: ReplicaLoad, text: str, model: str) -> bool:
    return any(text in name.lower() for name in (bar.name, bar.pod, bar.node, model))


def running_as_json(load: RunningLoad, model_name: str, replica: str, pod: str) -> Json:
    return {
        "model_name": model_name,
        "source_id": load.key.source_id,
        "worker_id": load.key.worker_id,
        "worker_rank": load.key.worker_rank,
        "replica": replica,
        "pod": pod,
        "path": load.path,
        "bytes_done": load.bytes_done,
        "bytes_total": load.bytes_total,
        "bytes_per_second": load.bytes_per_second,
        "eta_seconds": load.eta_seconds,
        "from_worker_id": load.from_worker_id,
        "holders": load.holders,
        "given": [one._asdict() for one in load.given],
        "running_seconds": load.running_seconds,
        "silent_seconds": load.silent_seconds,
    }
