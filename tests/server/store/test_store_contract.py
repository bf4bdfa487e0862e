"""What every store holds; a new kind of store joins by one line in tests/server/stores.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxserver.store import MemoryStore, NotOwner, Query, SourceStore, StoreUnavailable, UnknownRecord
from mxserver.store.index import RecordIndex
from mxserver.wire import StaleEpoch
from tests.server.stores import (
    COLLECT_SECONDS,
    HEARTBEAT_SECONDS,
    INITIALIZING,
    KINDS,
    READY,
    STALE,
    HandClock,
    StoreKind,
    key,
    publication,
)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> StoreKind:
    chosen: StoreKind = request.param
    return chosen


@pytest.fixture
def store(kind: StoreKind, tmp_path: Path, clock: HandClock) -> Iterator[SourceStore]:
    opened = kind.open(tmp_path, clock)
    yield opened
    opened.close()


@pytest.fixture
def reopen(store: SourceStore, kind: StoreKind, tmp_path: Path, clock: HandClock) -> Iterator[SourceStore]:
    """A second life of the same store; the first is closed by then."""
    store.close()
    opened = kind.open(tmp_path, clock)
    yield opened
    opened.close()


def status_of(store: SourceStore, worker: str = "w0") -> int | None:
    record = store.get(key().source_id, worker)
    return record.status if record else None


# Publishing


def test_published_record_is_found_whole(store: SourceStore, clock: HandClock) -> None:
    given = publication(nixl_metadata=b"\x00" * 1000)
    record = store.publish(given)
    assert record == store.get(*given.key[:2])
    assert (record.key, record.identity, record.worker) == (given.key, given.identity, given.worker)
    assert (record.model_name, record.accelerator, dict(record.topology)) == ("Org/Model", "cuda", {"zone": "a"})
    assert (record.status, record.updated_at_ms, record.source_load) == (INITIALIZING, clock.unix_ms(), None)


def test_epochs_grow_across_all_records(store: SourceStore) -> None:
    epochs = [store.publish(publication(key(f"w{n % 3}"))).epoch for n in range(10)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] > 0


def test_publish_replaces_the_record_of_the_same_source_worker_and_rank(store: SourceStore) -> None:
    store.publish(publication(nixl_metadata=b"old"))
    second = store.publish(publication(nixl_metadata=b"new"))
    assert store.find(Query()) == [second]
    assert b"new" in second.worker


def test_publish_without_status_keeps_ready(store: SourceStore) -> None:
    store.publish(publication())
    store.update_status(key(), READY)
    assert store.publish(publication()).status == READY


def test_publish_with_status_sets_it(store: SourceStore) -> None:
    assert store.publish(publication(status=READY)).status == READY
    assert store.publish(publication(status=INITIALIZING)).status == INITIALIZING


def test_publish_without_status_over_a_stale_record_begins_anew(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS)
    assert store.publish(publication()).status == INITIALIZING
    store.update_status(key(), STALE)
    assert store.publish(publication()).status == INITIALIZING


def test_publish_with_an_older_epoch_is_refused_and_changes_nothing(store: SourceStore) -> None:
    old = store.publish(publication()).epoch
    record = store.publish(publication(nixl_metadata=b"new life"))
    with pytest.raises(StaleEpoch, match=f"epoch {old} is older than {record.epoch}"):
        store.publish(publication(epoch=old, nixl_metadata=b"old life"))
    assert store.get(*key()[:2]) == record


@pytest.mark.parametrize("epoch", [2_000_000_000_000, 2**53, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_epoch_never_given_is_refused_and_the_store_goes_on(store: SourceStore, epoch: int) -> None:
    with pytest.raises(StaleEpoch, match=f"epoch {epoch} was never given"):
        store.publish(publication(epoch=epoch))
    store.check()
    assert store.publish(publication()).epoch < epoch


def test_publish_with_its_own_epoch_is_taken(store: SourceStore) -> None:
    first = store.publish(publication())
    assert store.publish(publication(epoch=first.epoch)).epoch > first.epoch


def test_any_epoch_of_the_present_life_is_taken_for_an_answer_may_get_lost(store: SourceStore) -> None:
    earlier = store.publish(publication()).epoch
    first = store.publish(publication())  # a new life
    lost = store.publish(publication(epoch=first.epoch))
    again = store.publish(publication(epoch=first.epoch, status=READY))
    assert first.epoch < lost.epoch < again.epoch
    assert first.life == lost.life == again.life == first.epoch
    for epoch in (first.epoch, lost.epoch, again.epoch):
        store.update_status(key(), READY, epoch=epoch)
    with pytest.raises(StaleEpoch):
        store.update_status(key(), READY, epoch=earlier)
    store.publish(publication())  # the next life
    for epoch in (first.epoch, lost.epoch, again.epoch):
        with pytest.raises(StaleEpoch):
            store.publish(publication(epoch=epoch))


def test_life_that_outlived_its_record_goes_on(store: SourceStore, clock: HandClock) -> None:
    first = store.publish(publication())
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    assert store.publish(publication(epoch=first.epoch)).life == first.epoch
    store.publish(publication(epoch=first.epoch))


# Owners


def test_record_is_changed_by_its_owner_alone(store: SourceStore) -> None:
    mine = store.publish(publication(owner="a"))
    assert mine.owner == "a"
    with pytest.raises(NotOwner, match="published by another caller than 'b'"):
        store.publish(publication(owner="b"))
    for status in (INITIALIZING, STALE):
        with pytest.raises(NotOwner):
            store.update_status(key(), status, owner="b")
    assert store.get(*key()[:2]) == mine
    store.update_status(key(), READY, owner="a")
    assert store.publish(publication(owner="a")).owner == "a"
    store.update_status(key(), STALE, owner="a")
    with pytest.raises(NotOwner):  # not even when it has left: it may come back
        store.publish(publication(owner="b"))


def test_record_of_nobody_is_taken_by_the_first_who_publishes_it(store: SourceStore) -> None:
    store.publish(publication())
    store.update_status(key(), READY, owner="b")
    assert store.publish(publication(owner="a")).owner == "a"
    assert store.publish(publication()).owner == "a"  # callers are not told apart: it stays whose it was
    store.update_status(key(), READY)


def test_name_of_a_record_that_is_gone_is_free(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(owner="a"))
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    assert store.publish(publication(owner="b")).owner == "b"


def test_ranks_of_a_worker_have_records_of_their_own_and_the_lowest_is_the_workers(
    store: SourceStore, clock: HandClock
) -> None:
    for rank in (1, 10, 2):
        store.publish(publication(key(rank=rank)))
        clock.advance(1)
    assert {record.key.worker_rank for record in store.find(Query())} == {1, 2, 10}
    lowest = store.get(*key()[:2])
    assert lowest is not None
    assert lowest.key.worker_rank == 1


@pytest.mark.parametrize("name", ["wörker-日本", "a\x00b", "'; DROP TABLE source; --", "w" * 10_000])
def test_any_text_is_a_worker_id(store: SourceStore, name: str) -> None:
    record = store.publish(publication(key(name)))
    assert store.get(key().source_id, name) == record


# Updates and leases


def test_update_sets_status_time_and_load(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication())
    clock.advance(5)
    store.update_status(key(), READY, source_load=0.5)
    record = store.get(*key()[:2])
    assert record is not None
    assert (record.status, record.source_load, record.updated_at_ms) == (READY, 0.5, clock.unix_ms())
    clock.advance(5)
    store.update_status(key(), READY)
    record = store.get(*key()[:2])
    assert record is not None
    assert (record.source_load, record.updated_at_ms) == (0.5, clock.unix_ms())
    store.update_status(key(), READY, source_load=0.25)
    assert store.find(Query())[0].source_load == 0.25


@pytest.mark.parametrize("wrong", [key("other"), key(rank=7), key(source="f" * 16)])
def test_update_of_an_unknown_record_is_refused(store: SourceStore, wrong: object) -> None:
    store.publish(publication())
    with pytest.raises(UnknownRecord, match="publish it first"):
        store.update_status(wrong, READY)
    assert status_of(store) == INITIALIZING


@pytest.mark.parametrize("status", [INITIALIZING, READY, STALE])
def test_update_with_an_older_epoch_is_refused_whatever_it_says(
    store: SourceStore, clock: HandClock, status: int
) -> None:
    old = store.publish(publication()).epoch
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS - 1)
    with pytest.raises(StaleEpoch):
        store.update_status(key(), status, epoch=old)
    clock.advance(1)
    assert status_of(store) == STALE  # the refused update was no sign of life


def test_update_with_the_right_epoch_or_none_is_taken(store: SourceStore) -> None:
    epoch = store.publish(publication()).epoch
    store.update_status(key(), READY, epoch=epoch)
    store.update_status(key(), READY)
    store.update_status(key(), INITIALIZING, epoch=epoch)
    assert status_of(store) == INITIALIZING


@pytest.mark.parametrize("status", [INITIALIZING, READY])
def test_record_is_stale_after_the_heartbeat_time_out_whatever_its_status(
    store: SourceStore, clock: HandClock, status: int
) -> None:
    store.publish(publication(status=status))
    before = store.find(Query())[0]
    clock.advance(HEARTBEAT_SECONDS - 0.001)
    assert status_of(store) == status
    clock.advance(0.001)
    assert status_of(store) == STALE
    assert store.sweep() == (1, 0)
    assert store.sweep() == (0, 0)
    after = store.find(Query())[0]
    assert (after.status, after.updated_at_ms, after.epoch) == (STALE, before.updated_at_ms, before.epoch)


def test_heartbeats_keep_a_record_alive(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(status=READY))
    for _ in range(10):
        clock.advance(HEARTBEAT_SECONDS - 1)
        store.sweep()
        store.update_status(key(), READY)
    assert status_of(store) == READY


@pytest.mark.parametrize("swept", [False, True])
def test_heartbeat_of_a_stale_worker_brings_it_back(store: SourceStore, clock: HandClock, swept: bool) -> None:
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS + 10)
    if swept:
        assert store.sweep() == (1, 0)
    store.update_status(key(), READY)
    assert status_of(store) == READY
    assert store.sweep() == (0, 0)
    clock.advance(HEARTBEAT_SECONDS - 1)
    assert status_of(store) == READY


@pytest.mark.parametrize("swept", [False, True])
def test_record_is_gone_when_it_was_stale_for_long(store: SourceStore, clock: HandClock, swept: bool) -> None:
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS)
    if swept:
        store.sweep()
    clock.advance(COLLECT_SECONDS - 1)
    assert status_of(store) == STALE
    clock.advance(1)
    assert store.find(Query()) == []
    assert status_of(store) is None
    with pytest.raises(UnknownRecord):
        store.update_status(key(), READY)
    assert store.sweep() == (0, 1)
    assert store.sweep() == (0, 0)


def test_goodbye_is_stale_at_once_and_repeating_it_does_not_prolong_it(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(status=READY))
    store.update_status(key(), STALE)
    assert status_of(store) == STALE
    clock.advance(COLLECT_SECONDS - 1)
    store.update_status(key(), STALE)
    clock.advance(1)
    assert status_of(store) is None


@pytest.mark.parametrize("swept", [False, True])
def test_goodbye_in_the_place_of_a_record_that_is_gone_is_a_new_one(
    store: SourceStore, clock: HandClock, swept: bool
) -> None:
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    if swept:
        store.sweep()
    store.publish(publication(status=STALE))
    assert status_of(store) == STALE
    clock.advance(COLLECT_SECONDS - 1)
    assert status_of(store) == STALE


# Finding


def test_filters_are_anded(store: SourceStore) -> None:
    store.publish(publication(key("a", 0), status=READY))
    store.publish(publication(key("b", 1), status=READY))
    store.publish(publication(key("c", 1)))
    store.publish(publication(key("d", 1, "f" * 16), model_name="Other", status=READY))

    def found(**filters: object) -> set[str]:
        return {record.key.worker_id for record in store.find(Query(**filters))}

    assert found() == {"a", "b", "c", "d"}
    assert found(source_id=key().source_id) == {"a", "b", "c"}
    assert found(model_name="org/mODEL") == {"a", "b", "c"}
    assert found(model_name="org") == set()
    assert found(status=READY) == {"a", "b", "d"}
    assert found(worker_rank=1) == {"b", "c", "d"}
    assert found(worker_rank=1, status=READY, model_name="Org/Model") == {"b"}
    assert found(source_id=key().source_id, model_name="Other") == set()
    assert found(source_id="unknown") == set()


def test_a_rank_is_listed_by_status_also_where_time_has_changed_it(store: SourceStore, clock: HandClock) -> None:
    def found(status: int | None, rank: int = 1) -> set[str]:
        query = Query(key().source_id, status=status, worker_rank=rank)  # type: ignore[arg-type]
        return {record.key.worker_id for record in store.find(query)}

    store.publish(publication(key("a", 1), status=READY))
    store.publish(publication(key("b", 1)))
    store.publish(publication(key("c", 2), status=READY))
    assert (found(READY), found(INITIALIZING), found(STALE), found(None)) == ({"a"}, {"b"}, set(), {"a", "b"})
    store.update_status(key("b", 1), READY)
    assert (found(READY), found(INITIALIZING)) == ({"a", "b"}, set())
    clock.advance(HEARTBEAT_SECONDS)
    assert (found(READY), found(STALE), found(None, 2)) == (set(), {"a", "b"}, {"c"})
    store.update_status(key("a", 1), READY)
    assert (found(READY), found(STALE)) == ({"a"}, {"b"})
    clock.advance(COLLECT_SECONDS)
    store.sweep()
    assert (found(None), found(STALE)) == ({"a"}, {"a"})


def test_a_list_of_one_rank_looks_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    for rank in range(8):
        for number in range(10):
            store.publish(publication(key(f"w{number}", rank), status=READY if number < 3 else INITIALIZING))
    view, looked_at = RecordIndex._view, []

    def counted(index: RecordIndex, entry: Any, now: float) -> Any:
        looked_at.append(entry.record.key)
        return view(index, entry, now)

    monkeypatch.setattr(RecordIndex, "_view", counted)
    assert len(store.find(Query(key().source_id, status=READY, worker_rank=5))) == 3
    assert sorted(looked_at) == [key(f"w{number}", 5) for number in range(3)]


def test_newest_sign_of_life_comes_first_and_the_limit_cuts_the_rest(store: SourceStore, clock: HandClock) -> None:
    for name in "abc":
        store.publish(publication(key(name), status=READY))
        clock.advance(1)
    store.update_status(key("a"), READY)
    assert [record.key.worker_id for record in store.find(Query())] == ["a", "c", "b"]
    assert [record.key.worker_id for record in store.find(Query(limit=2))] == ["a", "c"]


def test_dead_rows_are_left_out_before_the_limit(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(key("alive"), status=READY))
    clock.advance(10)
    store.publish(publication(key("dead"), status=READY))
    clock.advance(HEARTBEAT_SECONDS - 10)
    store.update_status(key("alive"), READY)
    clock.advance(10)
    assert [record.key.worker_id for record in store.find(Query(status=READY, limit=1))] == ["alive"]
    assert [record.key.worker_id for record in store.find(Query(status=STALE))] == ["dead"]


def test_minimum_of_updated_at(store: SourceStore, clock: HandClock) -> None:
    store.publish(publication(key("old")))
    clock.advance(1)
    newer = store.publish(publication(key("new")))
    assert store.find(Query(min_updated_at_ms=newer.updated_at_ms)) == [newer]
    assert store.find(Query(min_updated_at_ms=newer.updated_at_ms + 1)) == []


# Restarts and the end


def test_restart_keeps_lasting_records_and_gives_them_whole_leases(
    store: SourceStore, kind: StoreKind, clock: HandClock, request: pytest.FixtureRequest
) -> None:
    published = store.publish(publication(status=READY, nixl_metadata=b"x" * 5000, owner="a"))
    store.publish(publication(key("left")))
    store.update_status(key("left"), STALE)
    clock.advance(HEARTBEAT_SECONDS + 1)  # the server was down for longer than the lease
    again: SourceStore = request.getfixturevalue("reopen")
    if not kind.lasting:
        assert again.find(Query()) == []
        return
    record = again.get(*key()[:2])
    assert record is not None
    assert record.status == READY
    assert record.updated_at_ms == clock.unix_ms()
    assert (record.worker, record.identity) == (published.worker, published.identity)
    assert (record.epoch, record.life, record.owner) == (published.epoch, published.life, "a")
    assert (record.model_name, record.accelerator, dict(record.topology)) == ("Org/Model", "cuda", {"zone": "a"})
    assert status_of(again, "left") == STALE
    clock.advance(HEARTBEAT_SECONDS - 0.001)
    assert status_of(again) == READY
    again.update_status(key(), READY, epoch=published.epoch)


def test_what_was_swept_is_stale_after_a_restart_as_well(
    store: SourceStore, kind: StoreKind, clock: HandClock, request: pytest.FixtureRequest
) -> None:
    store.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS)
    store.sweep()
    again: SourceStore = request.getfixturevalue("reopen")
    assert status_of(again) == (STALE if kind.lasting else None)


def test_what_was_deleted_stays_deleted_and_its_epoch_is_not_used_again(
    store: SourceStore, clock: HandClock, request: pytest.FixtureRequest
) -> None:
    last = store.publish(publication(status=READY)).epoch
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    assert store.sweep() == (0, 1)
    again: SourceStore = request.getfixturevalue("reopen")
    assert again.find(Query()) == []
    assert again.publish(publication()).epoch > last


def test_epochs_grow_across_a_restart(
    store: SourceStore, kind: StoreKind, clock: HandClock, request: pytest.FixtureRequest
) -> None:
    old = max(store.publish(publication(key(f"w{n}"))).epoch for n in range(5))
    clock.advance(1)
    again: SourceStore = request.getfixturevalue("reopen")
    newer = again.publish(publication()).epoch
    assert newer > old
    with pytest.raises(StaleEpoch):
        again.publish(publication(epoch=old))


def test_epochs_hold_after_a_lost_store_and_a_clock_set_back(kind: StoreKind, tmp_path: Path, clock: HandClock) -> None:
    """The life before has an epoch above all of the new store's; a live worker of another record keeps its own."""
    with contextlib.closing(kind.open(tmp_path / "lost", clock)) as store:
        old = store.publish(publication(key("dead"))).epoch
        going_on = store.publish(publication(key("alive"))).epoch
    clock.unix_start_ms -= 3_600_000
    with contextlib.closing(kind.open(tmp_path / "new", clock)) as store:
        new = store.publish(publication(key("dead"), status=READY)).epoch
        assert new < old
        for refused in (
            lambda: store.update_status(key("dead"), STALE, epoch=old),
            lambda: store.update_status(key("dead"), READY, epoch=old),
            lambda: store.publish(publication(key("dead"), epoch=old)),
        ):
            with pytest.raises(StaleEpoch, match="was never given"):
                refused()
        taken = store.publish(publication(key("alive"), epoch=going_on))
        assert (taken.life, taken.epoch > going_on) == (going_on, True)
        store.update_status(key("alive"), READY, epoch=going_on)
        assert store.publish(publication(key("dead"))).epoch > taken.epoch


def test_closed_store_is_unavailable_and_not_empty(store: SourceStore) -> None:
    store.publish(publication())
    store.check()
    store.close()
    store.close()
    for call in (
        lambda: store.find(Query()),
        lambda: store.get(*key()[:2]),
        lambda: store.publish(publication()),
        lambda: store.update_status(key(), READY),
        store.sweep,
        store.check,
    ):
        with pytest.raises(StoreUnavailable, match="shutting down"):
            call()


def test_many_threads_lose_nothing_and_share_no_epoch(store: SourceStore) -> None:
    epochs: list[int] = []
    start = threading.Barrier(8)

    def publish(thread: int) -> None:
        start.wait()
        for n in range(25):
            epochs.append(store.publish(publication(key(f"w{thread}-{n}"))).epoch)
            store.update_status(key(f"w{thread}-{n}"), READY)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(epochs)) == 200
    assert {record.status for record in store.find(Query())} == {READY}
    assert len(store.find(Query())) == 200
