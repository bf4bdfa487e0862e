"""Stores against a model of a dozen lines: any order of publishes, updates, waits, sweeps and restarts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from mxserver.store import Query, RecordKey, UnknownRecord
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

KEYS = [key(worker, rank, source) for worker in "ab" for rank in (0, 1) for source in ("1" * 16, "2" * 16)]


@dataclass
class Expected:
    """What the model knows of a record."""

    status: int
    epoch: int
    life: int
    alive_until: float
    stale_since: float | None = None

    def at(self, now: float) -> int | None:
        """The status that everybody must see now; None when the record is gone."""
        since = self.alive_until if self.stale_since is None else self.stale_since
        if now >= since + COLLECT_SECONDS:
            return None
        return STALE if now >= since else self.status


class StoreMachine(RuleBasedStateMachine):
    """Clients hold on to epochs of all their lives, so that old ones come back."""

    kind: ClassVar[StoreKind]
    epochs = Bundle("epochs")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = HandClock()
        self.store = self.kind.open(Path(self.folder.name), self.clock)
        self.model: dict[RecordKey, Expected] = {}
        self.highest_epoch = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def status(self, record_key: RecordKey) -> int | None:
        expected = self.model.get(record_key)
        return expected.at(self.clock.seconds) if expected else None

    def is_refused(self, record_key: RecordKey, epoch: int) -> bool:
        if self.status(record_key) is None or not epoch:
            return False
        return not self.model[record_key].life <= epoch <= self.model[record_key].epoch

    @rule(target=epochs, record_key=st.sampled_from(KEYS), status=st.sampled_from([0, INITIALIZING, READY, STALE]))
    def publish(self, record_key: RecordKey, status: int) -> int:
        return self.published(record_key, status, 0)

    @rule(
        target=epochs,
        record_key=st.sampled_from(KEYS),
        status=st.sampled_from([0, INITIALIZING, READY]),
        epoch=consumes(epochs),
    )
    def publish_again(self, record_key: RecordKey, status: int, epoch: int) -> object:
        if self.is_refused(record_key, epoch):
            with pytest.raises(StaleEpoch):
                self.store.publish(publication(record_key, status=status, epoch=epoch))
            return epoch
        return multiple(epoch, self.published(record_key, status, epoch))

    def published(self, record_key: RecordKey, status: int, epoch: int) -> int:
        record = self.store.publish(publication(record_key, status=status, epoch=epoch))
        before = self.status(record_key)
        if status == 0:
            status = INITIALIZING if before in (None, STALE) else before
        stale_since = None
        if status == STALE:
            stale_since = self.clock.seconds
            if before == STALE:
                old = self.model[record_key]
                stale_since = old.alive_until if old.stale_since is None else old.stale_since
        life = self.model[record_key].life if epoch and before is not None else epoch or record.epoch
        self.model[record_key] = Expected(
            status, record.epoch, life, self.clock.seconds + HEARTBEAT_SECONDS, stale_since
        )
        assert record.epoch > self.highest_epoch
        self.highest_epoch = record.epoch
        return record.epoch

    @rule(record_key=st.sampled_from(KEYS), status=st.sampled_from([INITIALIZING, READY, STALE]), epoch=epochs)
    def update_with_epoch(self, record_key: RecordKey, status: int, epoch: int) -> None:
        self.update(record_key, status, epoch)

    @rule(record_key=st.sampled_from(KEYS), status=st.sampled_from([INITIALIZING, READY, STALE]))
    def update_without_epoch(self, record_key: RecordKey, status: int) -> None:
        self.update(record_key, status, 0)

    def update(self, record_key: RecordKey, status: int, epoch: int) -> None:
        before = self.status(record_key)
        if before is None:
            with pytest.raises(UnknownRecord):
                self.store.update_status(record_key, status, epoch=epoch)
            return
        if self.is_refused(record_key, epoch):
            with pytest.raises(StaleEpoch):
                self.store.update_status(record_key, status, epoch=epoch)
            return
        self.store.update_status(record_key, status, epoch=epoch)
        expected = self.model[record_key]
        if status != STALE:
            expected.status, expected.stale_since = status, None
            expected.alive_until = self.clock.seconds + HEARTBEAT_SECONDS
        elif before != STALE:
            expected.status, expected.stale_since = STALE, self.clock.seconds

    @rule(seconds=st.sampled_from([0.001, 1.0, 30.0, HEARTBEAT_SECONDS, COLLECT_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.store.sweep()

    @rule()
    def restart(self) -> None:
        self.store.sweep()
        self.store.close()
        self.clock.advance(1.0)
        statuses = {record_key: expected.at(self.clock.seconds - 1.0) for record_key, expected in self.model.items()}
        self.store = self.kind.open(Path(self.folder.name), self.clock)
        for record_key, status in statuses.items():
            if status is None or not self.kind.lasting:
                del self.model[record_key]
            else:
                self.model[record_key].status = status
                self.model[record_key].alive_until = self.clock.seconds + HEARTBEAT_SECONDS
                self.model[record_key].stale_since = self.clock.seconds if status == STALE else None

    @invariant()
    def every_reader_sees_what_the_model_sees(self) -> None:
        visible = {k: status for k in self.model if (status := self.status(k)) is not None}
        found = self.store.find(Query())
        assert {record.key: record.status for record in found} == visible
        assert {record.key: record.epoch for record in found} == {k: self.model[k].epoch for k in visible}
        times = [record.updated_at_ms for record in found]
        assert times == sorted(times, reverse=True)
        for source in ("1" * 16, "2" * 16):
            ready = self.store.find(Query(source_id=source, status=READY))
            assert {record.key for record in ready} == {
                k for k, status in visible.items() if status == READY and k.source_id == source
            }
            assert self.store.find(Query(source_id=source, status=READY, limit=1)) == ready[:1]
            for worker in "ab":
                record = self.store.get(source, worker)
                assert (record is None) == (not any(k[:2] == (source, worker) for k in visible))


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_store_behaves_as_the_model(kind: StoreKind) -> None:
    machine = type(f"{kind.name}Machine", (StoreMachine,), {"kind": kind})
    run = machine.TestCase
    slow = [HealthCheck.too_slow]  # a loaded machine is no fault
    run.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=slow)
    run("runTest").runTest()
