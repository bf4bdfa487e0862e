"""A worker that only pulls: bounded waits, its tries; and which rungs each role has."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxcore.engine import Role  # noqa: E402
from mxcore.engine.context import LoadContext  # noqa: E402
from mxcore.engine.report import Fallbacks  # noqa: E402
from mxcore.engine.rungs import Wait, peer, rungs_of, target, wait_for_ranks  # noqa: E402
from mxcore.engine.weights import Weights  # noqa: E402
from mxcore.errors import (  # noqa: E402
    LayoutMismatch,
    LayoutUnsupported,
    LoadPathsExhausted,
    SourceRefused,
    SourceUnreachable,
)
from mxcore.load_ladder import Ladder  # noqa: E402
from mxcore.settings import load_settings  # noqa: E402
from mxserver.wire import ServerUnreachable  # noqa: E402
from tests.engine.plain_engine import PlainEngine  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds, self.pauses = 1000.0, 0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.pauses += 1


class Workers:
    """Stands for a membership: each look finds what comes next, the last one for ever."""

    def __init__(self, *found: Any) -> None:
        self.found = list(found)
        self.identity = SimpleNamespace(model_name="m")

    def _next(self) -> Any:
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]

    def find_sources(self, **_: Any) -> list[Any]:
        return [SimpleNamespace(worker_id=name, receiving=False) for name in self._next()]

    def published_ranks(self, *, ready: bool) -> set[int]:
        return {0}

    def withdraw(self) -> bool:
        return True


class Ranks(Workers):
    """The ranks that are published, or what asking for them raises."""

    def published_ranks(self, *, ready: bool) -> set[int]:
        answer = self._next()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[Clock]:
    made: list[Clock] = []

    class Quick(Wait):
        def __init__(self, what: str, limit_seconds: float) -> None:
            made.append(Clock())
            super().__init__(what, limit_seconds, now=made[-1].now, sleep=made[-1].sleep)

    monkeypatch.setattr(target, "Wait", Quick)
    return made


def context(role: Role, workers: Workers, **settings: Any) -> LoadContext:
    engine = PlainEngine(Path("m"), {}, processed_weights_move=True)
    return LoadContext(engine, role, load_settings(settings, {}), Fallbacks(), ExitStack(), membership=workers)


class Climb:
    """A target that climbs its ladder; each transfer comes to the next of `outcomes`. `tried`: from whom."""

    def __init__(self, patch: pytest.MonkeyPatch, workers: Workers, outcomes: list[Any], **settings: Any) -> None:
        self.tried: list[list[str]] = []
        self.error = self.reason = ""
        self.loaded: Any = None

        def load(rung: Any) -> Any:
            names = [source.worker_id for source in rung._sources]
            self.tried.append(names)
            outcome = outcomes.pop(0)
            if not isinstance(outcome, Exception):
                return outcome
            rung._attempt = peer.Attempt(Weights("raw", torch.device("cpu")))
            if not isinstance(outcome, LayoutUnsupported):
                rung._tried.failed.update(names)
                rung._attempt.others_may_do = True
            raise outcome

        patch.setattr(peer.PeerRung, "load", load)
        self.context = context(ROLES["target"], workers, **settings)
        ladder = Ladder(rungs_of(self.context))
        try:
            self.loaded = ladder.climb()
        except LoadPathsExhausted:
            self.reason = ladder.steps[-1].reason


def test_the_rungs_of_each_role() -> None:
    names = {
        name: [type(rung).__name__ for rung in rungs_of(context(role, Workers([])))] for name, role in ROLES.items()
    }
    assert names["target"] == ["TargetRung"]
    assert names["source"] == ["UriRung", "CacheRung", "EngineRung"]
    assert names["both"] == ["PeerRung", "RawRung", "FleetRung", *names["source"]]
    chosen = context(ROLES["both"], Workers([]), load_paths="engine,p2p", layout="raw")
    assert [type(rung).__name__ for rung in rungs_of(chosen)] == ["EngineRung", "PeerRung"]


def test_a_wait_is_bounded_and_says_what_for_every_half_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO):
        wait = Wait("a source", 65.5, now=clock.now, sleep=clock.sleep)
        while wait.pause():
            pass
    assert (clock.seconds - 1000.0, clock.pauses) == (65.5, 66)
    assert caplog.messages == [
        "waiting for a source, at most 65.5 s",
        "still waiting for a source: 30 of 65.5 s",
        "still waiting for a source: 60 of 65.5 s",
    ]


@pytest.mark.parametrize(
    ("answers", "came", "pauses"), [([{0}, ServerUnreachable("away"), {0, 1}], True, 2), ([{0}], False, 10)]
)
def test_ranks_are_waited_for(answers: list[Any], came: bool, pauses: int) -> None:
    """Through a server that is away for a moment; and not for ever."""
    clock = Clock()
    wait = Wait("ranks", 10.0, now=clock.now, sleep=clock.sleep)
    assert wait_for_ranks(Ranks(*answers), wait, 2, ready=True) is came
    assert clock.pauses == pauses


def test_a_target_takes_a_source_that_comes_late(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers([], [], ["a"]), ["model"])
    assert (climb.loaded, climb.tried) == ("model", [["a"]])


def test_a_target_gives_up_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers([]), [], source_wait_seconds=3)
    assert climb.tried == []
    assert climb.reason == "no source is there within 3 s (MX_SOURCE_WAIT_SECS)"
    assert "within 7200 s" in Climb(monkeypatch, Workers([]), []).reason


def test_a_target_tries_again(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers(["a"]), [SourceUnreachable("gone"), "model"])
    assert (climb.loaded, climb.tried) == ("model", [["a"], ["a"]])


def test_a_target_tries_less_often_where_that_goes_on_failing(
    monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]
) -> None:
    climb = Climb(monkeypatch, Workers(["a"]), [*[SourceRefused("no")] * 5, "model"])
    assert (climb.loaded, climb.tried) == ("model", [["a"]] * 6)
    assert clocks[-1].pauses == 1 + 2 + 4 + 8 + 8


@pytest.mark.parametrize("error", [SourceRefused("no"), RuntimeError("unheard of")])
def test_a_target_gives_up_though_a_source_is_there(
    error: Exception, monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]
) -> None:
    climb = Climb(monkeypatch, Workers(["a"]), [error] * 50, source_wait_seconds=20)
    assert climb.tried == [["a"]] * 5  # after 0, 1, 3, 7 and 15 s
    assert climb.reason == (
        f"no source gave the weights within 20 s (MX_SOURCE_WAIT_SECS); the last transfer failed: {error}"
    )


def test_a_source_with_another_layout_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers(["a"], ["a"], ["a", "b"]), [LayoutMismatch("names"), "model"])
    assert (climb.loaded, climb.tried) == ("model", [["a"], ["b"]])
    climb = Climb(monkeypatch, Workers(["a"]), [LayoutMismatch("names differ")], source_wait_seconds=2)
    assert climb.tried == [["a"]]
    assert "the last transfer failed: names differ" in climb.reason


def test_weights_that_cannot_move_end_the_wait(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers(["a"]), [LayoutUnsupported("opaque")])
    assert climb.tried == [["a"]]
    assert "cannot be taken from a worker" in climb.reason


def test_ranks_begin_together(monkeypatch: pytest.MonkeyPatch, clocks: list[Clock]) -> None:
    climb = Climb(monkeypatch, Workers(["a"]), ["model"], sync_start="1")
    assert (climb.loaded, climb.tried) == ("model", [["a"]])
    assert climb.context.engine.events == ["barrier"]
    climb = Climb(monkeypatch, Workers(["a"]), ["model"], sync_start="1", expected_workers=2, source_wait_seconds=2)
    assert climb.tried == []
    assert "not all 2 ranks have a source (MX_SYNC_START) within 2 s" in climb.reason
