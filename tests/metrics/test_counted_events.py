"""What a worker's metrics count, by what happens to a real holder, and to a load: each event, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mxcore.engine.context import LoadContext
from mxcore.errors import HolderBusy, HolderDraining, LayoutMismatch
from mxcore.metrics import FAMILIES
from mxcore.metrics.exporter import Ranks
from mxcore.metrics.recording import Recorder, record
from mxcore.transfer.member import Refusal
from mxcore.transfer.serve import Holder, SelfCheck
from tests.transfer.conftest import wait_for
from tests.transfer.serve.test_holder import holder, new_holder
from tests.transfer.serve.test_self_check import flipped

__all__ = ["flipped", "holder"]  # fixtures

Counted = Callable[..., float]


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[Counted]:
    """The value of a series, as the exporter would tell it; this process counts from here on."""
    recorder = Recorder(tmp_path, FAMILIES)
    record(recorder)

    def value(name: str, **labels: str) -> float:
        [found] = [
            sample.value
            for family in Ranks(tmp_path).collect()
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        return float(found)

    yield value
    record(None)
    recorder.leave()
    recorder.close()


def test_what_becomes_of_leases(counted: Counted) -> None:
    one = new_holder(most_readers=1)
    lease = one.grant("first")
    assert counted("mxworker_readers") == 1
    with pytest.raises(HolderBusy):
        one.grant("second")
    one.release(lease.lease_id)
    one.grant("third")
    assert not one.drain(0)
    with pytest.raises(HolderDraining):
        one.grant("fourth")
    one.close()
    events = {"granted": 2, "busy": 1, "draining": 1, "released": 1, "cut": 1, "expired": 0, "replaced": 0}
    assert {event: counted("mxworker_leases_total", event=event) for event in events} == events
    assert counted("mxworker_readers") == 0


def test_a_lease_without_a_sign_is_one_that_expired(counted: Counted) -> None:
    one = new_holder(lease_seconds=0.05)
    one.grant()
    wait_for(lambda: one.live_leases == 0)
    one.close()
    assert counted("mxworker_leases_total", event="expired") == 1


def test_damaged_memory_is_a_chunk_that_was_checked_and_wrong(counted: Counted, holder: Holder, flipped: int) -> None:
    found = threading.Event()
    check = SelfCheck(holder, lambda chunks: found.set())
    check.start()
    assert found.wait(60)
    check.stop()
    assert counted("mxworker_self_checked_wrong_chunks_total") == 1
    assert counted("mxworker_self_checked_chunks_total") > flipped
    assert counted("mxworker_self_check_seconds_total") > 0


def test_refusals_are_counted_by_side_and_reason(counted: Counted) -> None:
    context = SimpleNamespace(refusals=[], membership=None)
    LoadContext.refused(context, "receive", LayoutMismatch("another layout"))  # type: ignore[arg-type]
    [refusal] = context.refusals
    assert isinstance(refusal, Refusal)
    assert counted("mxworker_refusals_total", side="receive", reason=refusal.reason) == 1
    assert refusal.reason == "layout_mismatch"
