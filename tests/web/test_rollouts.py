"""What follows from loads that have ended: rollouts, time to ready, who fed whom; and records as replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mxserver.store import RecordKey, SourceRecord
from mxserver.telemetry import FinishedLoad, LoadHistory
from mxserver.telemetry.loads import Given, RunningLoad
from mxserver.web.models_view import WANTED_SECONDS, Fleet, Histories, Models, StatusQuery
from mxserver.web.replicas import NamesOfRecords
from mxserver.web.rollouts import LISTED_RECEIVERS, ROLLOUT_GAP_SECONDS, feeds, quantile, rollouts
from mxserver.wire.proto import load_pb2, p2p_pb2, record_pb2

READY = p2p_pb2.SOURCE_STATUS_READY
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
STALE = p2p_pb2.SOURCE_STATUS_STALE
SECOND = 1000


def ended(worker: str, at_seconds: float, *, rank: int = 0, replica: str = "", **changes: object) -> FinishedLoad:
    """A load of 100 bytes in 6 s: 1 s of waiting, 2 s of bytes, 3 s of processing."""
    load = FinishedLoad(
        key=RecordKey("s", worker, rank),
        model_name="org/M",
        at_ms=round(at_seconds * SECOND),
        path="peer_tcp",
        bytes=100,
        seconds=2.0,
        from_worker_id="",
        chunks_verified=1,
        fallbacks=(),
        wait_seconds=1.0,
        transfer_seconds=2.0,
        process_seconds=3.0,
        bytes_from_workers=100,
        replica=replica or worker,
        pod_name=f"pod-{replica or worker}",
    )
    return replace(load, **changes)  # type: ignore[arg-type]


def test_loads_that_follow_each_other_are_one_rollout() -> None:
    gap = ROLLOUT_GAP_SECONDS
    loads = [ended("a", 100), ended("b", 100 + gap + 5), ended("c", 100 + 2 * gap + 12)]
    newest, oldest = rollouts(loads)
    assert [bar.name for bar in oldest.replicas] == ["a", "b"], "b began before the gap was over"
    assert [bar.name for bar in newest.replicas] == ["c"]
    assert rollouts([]) == []


def test_a_replica_is_ready_when_its_last_rank_is() -> None:
    loads = [ended("a0", 106, replica="a"), ended("a1", 110, rank=1, replica="a", process_seconds=4.0)]
    [run] = rollouts(loads)
    [bar] = run.replicas
    assert (bar.ranks, bar.bytes, bar.process_seconds) == (2, 200, 4.0)
    assert bar.ready_seconds == pytest.approx(10), "from the first one's joining, at 100, to the last one's report"
    told = run.as_json()
    assert (told["replicas"], told["ranks"], told["ready_seconds_all"]) == (1, 2, 10)


def test_a_worker_that_tells_no_parts_counts_by_its_load() -> None:
    old = ended("a", 100, wait_seconds=0.0, transfer_seconds=0.0, process_seconds=0.0)
    [run] = rollouts([old])
    assert run.replicas[0].ready_seconds == pytest.approx(2)
    assert run.replicas[0].transfer_seconds == 2


def test_quantiles_are_values_that_were_measured() -> None:
    assert [quantile([1, 2, 3, 4], share) for share in (0.5, 0.95, 0)] == [2, 4, 1]
    assert quantile([], 0.5) == 0


def test_who_fed_whom_adds_up_and_names_what_is_left_out() -> None:
    """Bytes of givers that a report does not name, and those of storage, are there too."""
    loads = [
        ended("b", 100, given=(("a", 60),), bytes_from_workers=90),
        ended("a", 50, path="storage", bytes_from_workers=0),
    ]
    found, left = feeds(loads, [], {"a": "a", "b": "b"}, {"a": "pod-a"}, most=10)
    by_giver = {one["from"]: one for one in found}
    assert {giver: one["bytes"] for giver, one in by_giver.items()} == {"storage": 110, "a": 60, "": 30}
    assert sum(one["bytes"] for one in found) == sum(load.bytes for load in loads)
    assert by_giver["a"]["pod"] == "pod-a"
    assert by_giver["a"]["receivers"][0]["bytes_per_second"] == 30
    assert by_giver["a"]["bytes_per_second"] is None, "nothing runs"
    many = [ended(f"r{n}", 100, given=(("a", 100),)) for n in range(LISTED_RECEIVERS + 3)]
    [giver], left = feeds([*many, *loads], [], {}, {}, most=1)
    assert left == 2
    assert giver["receivers_total"] == LISTED_RECEIVERS + 4
    assert giver["receivers_left_out"] == 4


def test_a_load_that_runs_has_the_rate_of_now() -> None:
    running = RunningLoad(
        RecordKey("s", "c", 0), "peer_tcp", 50, 100, "a", 1, 10.0, 5.0, 1.0, 0.0, (Given("a", 50, 10.0),)
    )
    [giver], _ = feeds([], [running], {"a": "A"}, {}, most=10)
    assert (giver["from"], giver["bytes"], giver["bytes_per_second"]) == ("A", 50, 10)
    assert giver["receivers"][0]["running"] is True


def record(
    worker: str, rank: int = 0, status: p2p_pb2.SourceStatus.ValueType = READY, *, size: int = 1, **facts: str
) -> SourceRecord:
    identity = p2p_pb2.SourceIdentity(model_name="org/M", tensor_parallel_size=size)
    return SourceRecord(
        key=RecordKey("s", worker, rank),
        status=status,
        epoch=1,
        life=1,
        updated_at_ms=0,
        identity=identity.SerializeToString(),
        worker=record_pb2.WorkerFacts(**facts).SerializeToString(),  # type: ignore[arg-type]
        model_name="org/M",
        accelerator="cpu",
        topology={},
    )


def models(records: list[SourceRecord], history: LoadHistory | None = None) -> Models:
    return Models(Fleet(records, NamesOfRecords().of(records)), [], Histories(history or LoadHistory()).all())


def states(*records: SourceRecord) -> dict[str, str]:
    [model] = models(list(records)).all()
    return {replica.name: replica.state for replica in model.replicas}


def test_ranks_of_one_engine_are_one_replica() -> None:
    whole = [record(f"w{rank}", rank, size=2, replica="e1", pod_name="p") for rank in range(2)]
    assert states(*whole) == {"e1": "ready"}
    assert states(whole[0]) == {"e1": "incomplete"}, "one of two ranks"
    assert states(whole[0], replace(whole[1], status=INITIALIZING)) == {"e1": "initializing"}
    assert states(whole[0], replace(whole[1], status=STALE)) == {"e1": "incomplete"}
    assert states(*(replace(one, status=STALE) for one in whole)) == {"e1": "stale"}


def test_a_worker_that_names_no_engine_is_a_replica_by_itself() -> None:
    assert states(record("w0", 0, size=8), record("w1", 1, size=8)) == {"w0": "ready", "w1": "ready"}


def test_weights_that_are_offered_twice_make_no_second_replica() -> None:
    raw = record("w1", replica="e1")
    raw = replace(raw, key=RecordKey("other", "w1", 0), status=INITIALIZING)
    assert states(record("w0", replica="e1"), raw) == {"e1": "ready"}


def test_names_are_read_once_for_each_epoch() -> None:
    names = NamesOfRecords()
    first = record("w", pod_name="one")
    assert names.of([first])[first.key].pod == "one"
    changed = replace(record("w", pod_name="two"), epoch=1)
    assert names.of([changed])[first.key].pod == "one"
    assert names.of([replace(changed, epoch=2)])[first.key].pod == "two"


def test_wanted_are_those_that_live_or_for_an_hour_those_of_the_last_rollout() -> None:
    history = LoadHistory()
    for n in range(3):
        report = load_pb2.LoadReport(bytes=1, seconds=1.0)
        history.add(load_pb2.KeptLoad(worker_id=f"w{n}", model_name="org/M", at_unix_ms=10_000, report=report))
    living = [record("w0"), record("w1", status=INITIALIZING), record("w2", status=STALE)]
    [model] = models(living, history).all()
    assert model.as_json(11_000)["replicas"] == {
        "initializing": 1,
        "incomplete": 0,
        "ready": 1,
        "stale": 1,
        "wanted": 3,
    }
    assert model.wanted(10_000 + round(1000 * WANTED_SECONDS) + 1) == 2
    [model] = models([*living, *(record(f"v{n}") for n in range(5))], history).all()
    assert model.wanted(11_000) == 7
    [gone] = models([], history).all()
    assert (gone.name, gone.wanted(11_000)) == ("org/M", 3)


def test_an_engine_that_starts_again_in_its_pod_counts_once() -> None:
    history = LoadHistory()
    for n in range(3):
        report = load_pb2.LoadReport(bytes=1, seconds=1.0)
        kept = load_pb2.KeptLoad(worker_id=f"w{n}", model_name="m", at_unix_ms=10_000 + n, pod_name="p", report=report)
        history.add(kept)
    [model] = models([], history).all()
    assert model.wanted(11_000) == 1


def test_details_say_how_much_they_leave_out() -> None:
    all_ = models([record(f"w{n:02}", pod_name=f"pod-{n}") for n in range(30)])
    told = all_.details("org/m", StatusQuery(replicas=4, ranks=frozenset({"w01"})), 0)
    assert [one["replica"] for one in told["replicas"]] == ["w00", "w01", "w10", "w11"], "by the names of pods"
    assert (told["replicas_total"], told["left_out"]["replicas"]) == (30, 26)
    assert [len(one.get("ranks", ())) for one in told["replicas"]] == [0, 1, 0, 0]
    found = all_.details("org/m", StatusQuery(search="POD-29"), 0)
    assert ([one["pod"] for one in found["replicas"]], found["left_out"]["replicas"]) == (["pod-29"], 0)
    assert list(all_.found("pod-29")) == ["org/m"]
    assert list(all_.found("nothing")) == []
    assert all_.asked(StatusQuery(sources=frozenset({"s", "unknown"}), models=("ORG/m", "no"))) == ["org/m"]
