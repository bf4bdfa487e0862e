"""The ladder: order, reasons, what a failed rung leaves behind, and what leaves the ladder when all fail."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.errors import LoadPathsExhausted, TransferError
from mxcore.load_ladder import RUNGS, Ladder, PollResult, Step, chosen_rungs, reason_of, skip, take
from mxcore.settings import load_settings


class Model:
    """Something to load: with a cycle, as models have."""

    def __init__(self) -> None:
        self.itself = self


class FakeRung:
    """A rung that does as it is told, and notes what was asked of it."""

    def __init__(
        self,
        name: str,
        events: list[str],
        *,
        look: PollResult | Exception = take("it is there"),  # noqa: B008 - immutable
        error: Exception | None = None,
        tries: int = 1,
        is_last_resort: bool = False,
        touch: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._tries_left = tries
        self.is_last_resort = is_last_resort
        self.given_up: list[weakref.ref[Model]] = []
        self._events, self._poll, self._error, self._touch = events, look, error, touch

    def poll(self) -> PollResult:
        self._events.append(f"look {self.name}")
        if isinstance(self._poll, Exception):
            raise self._poll
        return self._poll

    def load(self) -> Model:
        self._events.append(f"load {self.name}")
        self._touch()
        model = Model()
        self.given_up.append(weakref.ref(model))
        if self._error is not None:
            raise type(self._error)(*self._error.args)  # a new one: an exception holds the frames that it came through
        return model

    def undo(self) -> None:
        self._events.append(f"undo {self.name}")

    def done(self) -> None:
        """Nothing is kept."""

    def again(self) -> bool:
        self._tries_left -= 1
        return self._tries_left > 0


def test_the_first_rung_that_can_gives_the_model() -> None:
    events: list[str] = []
    rungs = [
        FakeRung("p2p", events, look=skip("nobody has them")),
        FakeRung("uri", events),
        FakeRung("engine", events),
    ]
    ladder = Ladder(rungs, restore=lambda: events.append("restore"))

    assert isinstance(ladder.climb(), Model)
    assert events == ["look p2p", "look uri", "load uri"]
    assert [(step.rung, step.outcome, step.reason) for step in ladder.steps] == [
        ("p2p", "skipped", "nobody has them"),
        ("uri", "loaded", "it is there"),
    ]
    assert ladder.steps[0].seconds == 0.0


def test_a_failure_is_undone_before_the_next_rung_begins() -> None:
    events: list[str] = []
    failed: list[Step] = []
    rungs = [
        FakeRung("p2p", events, error=TransferError("cut off")),
        FakeRung("uri", events, error=ZeroDivisionError("a fault of ours")),
        FakeRung("engine", events),
    ]
    Ladder(rungs, restore=lambda: events.append("restore"), failed=failed.append).climb()

    assert events == [
        *("look p2p", "load p2p", "undo p2p", "restore"),
        *("look uri", "load uri", "undo uri", "restore"),
        *("look engine", "load engine"),
    ]
    assert [str(step) for step in failed] == [
        "p2p failed: cut off [MX_TRANSFER]",
        "uri failed: ZeroDivisionError: a fault of ours",
    ]


def test_a_model_that_was_given_up_is_gone_before_the_next_one_is_built() -> None:
    events: list[str] = []
    first = FakeRung("p2p", events, error=TransferError("cut off"))
    alive: list[object] = []
    gc.disable()  # so that only the ladder's own collection can have done it
    try:
        second = FakeRung("engine", events, touch=lambda: alive.extend(ref() for ref in first.given_up))
        Ladder([first, second]).climb()
    finally:
        gc.enable()
    assert alive == [None]


def test_a_rung_is_tried_again_as_long_as_it_says() -> None:
    events: list[str] = []
    rungs = [FakeRung("fleet", events, error=TransferError("cut off"), tries=2), FakeRung("engine", events)]
    ladder = Ladder(rungs)
    ladder.climb()
    assert [str(step) for step in ladder.steps][:2] == ["fleet failed: cut off [MX_TRANSFER]"] * 2

    events.clear()
    Ladder([FakeRung("fleet", events, look=skip("nobody"), tries=2), FakeRung("engine", events)]).climb()
    assert events.count("look fleet") == 1, "nothing changes when it is asked again at once"


def test_a_look_that_raises_is_a_reason_to_skip() -> None:
    events: list[str] = []
    failed: list[Step] = []
    ladder = Ladder(
        [FakeRung("cache", events, look=OSError("no such host")), FakeRung("engine", events)], failed=failed.append
    )
    ladder.climb()
    assert "no such host" in ladder.steps[0].reason
    assert [step.rung for step in failed] == ["cache"]
    assert "undo cache" not in events


def test_undoing_that_fails_keeps_nobody_from_going_on() -> None:
    events: list[str] = []
    failed: list[Step] = []
    rung = FakeRung("p2p", events, error=TransferError("cut off"))

    def broken() -> None:
        raise RuntimeError("no way back")

    rung.undo = broken  # type: ignore[method-assign]
    Ladder([rung, FakeRung("engine", events)], restore=broken, failed=failed.append).climb()
    assert [step.reason for step in failed][1:] == [
        "undoing it: RuntimeError: no way back",
        "restoring the engine's state: RuntimeError: no way back",
    ]


def test_the_last_resort_raises_its_own() -> None:
    events: list[str] = []
    rungs = [
        FakeRung("p2p", events, error=TransferError("cut off")),
        FakeRung("engine", events, error=ValueError("no such architecture"), is_last_resort=True),
    ]
    with pytest.raises(ValueError, match="no such architecture"):
        Ladder(rungs).climb()


def test_a_last_resort_that_is_not_last_is_a_rung_like_others() -> None:
    events: list[str] = []
    rungs = [
        FakeRung("engine", events, error=ValueError("no files"), is_last_resort=True),
        FakeRung("uri", events),
    ]
    ladder = Ladder(rungs)
    ladder.climb()
    assert [step.outcome for step in ladder.steps] == ["failed", "loaded"]


def test_without_a_last_resort_one_error_has_every_reason() -> None:
    events: list[str] = []
    rungs = [
        FakeRung("p2p", events, look=skip("nobody has them")),
        FakeRung("fleet", events, error=TransferError("cut off")),
    ]
    with pytest.raises(LoadPathsExhausted) as caught:
        Ladder(rungs).climb()
    assert "p2p skipped: nobody has them; fleet failed: cut off [MX_TRANSFER]" in str(caught.value)
    assert "mx explain" in str(caught.value)
    assert str(caught.value).endswith("[MX_LOAD_PATHS_EXHAUSTED]")


def test_an_interrupt_goes_through() -> None:
    events: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ladder([FakeRung("p2p", events, touch=interrupt), FakeRung("engine", events)]).climb()
    assert "load engine" not in events


def test_every_rung_says_its_reason_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []
    rungs = [
        FakeRung("p2p", events, look=skip("nobody has them")),
        FakeRung("uri", events, error=TransferError("two\nlines")),
        FakeRung("engine", events),
    ]
    with caplog.at_level(logging.INFO, "mxcore.load_ladder"):
        Ladder(rungs).climb()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "load path p2p (a worker that has the weights): skipped: nobody has them"
    assert lines[1] == "load path uri (MX_MODEL_URI): taken: it is there"
    assert lines[2].startswith("load path uri failed after ")
    assert "two lines" in lines[2]
    assert lines[3] == "load path engine (the engine's own loader): taken: it is there"
    assert len(lines) == 4


def test_names_choose_and_order() -> None:
    assert chosen_rungs(None) == tuple(RUNGS)
    assert chosen_rungs(" engine , P2P,") == ("engine", "p2p")


@given(st.permutations(sorted(RUNGS)), st.integers(1, len(RUNGS)))
def test_any_choice_in_any_order(names: list[str], count: int) -> None:
    assert chosen_rungs(",".join(names[:count])) == tuple(names[:count])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("p2p,engin", "the nearest one is 'engine'"),
        ("p2p,engine,p2p", "'p2p' is named twice"),
        (" , ", "it names no path"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_and_the_default_used(
    text: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=problem):
        chosen_rungs(text)
    assert load_settings({}, {"MX_LOAD_PATHS": text}).load_paths == tuple(RUNGS)
    assert any("MX_LOAD_PATHS" in line and problem in line for line in caplog.messages)


def test_settings_take_a_choice_from_either_side() -> None:
    assert load_settings({}, {"MX_LOAD_PATHS": "p2p,engine"}).load_paths == ("p2p", "engine")
    assert load_settings({"load_paths": ["engine"]}, {"MX_LOAD_PATHS": "p2p"}).load_paths == ("engine",)


def test_a_reason_is_one_line() -> None:
    assert reason_of(OSError("a\n  b")) == "OSError: a b"
    assert reason_of(TransferError("a")) == "a [MX_TRANSFER]"
