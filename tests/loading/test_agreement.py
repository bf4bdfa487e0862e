"""Agreement without an engine: what a broken one leaves, and messages that always fit."""

from __future__ import annotations

import pytest

from mxcore import agreement
from mxcore.agreement import MESSAGE_BYTES, Agreement
from mxcore.errors import LoadPathsExhausted
from mxcore.load_ladder import Ladder, PollResult, Rung, take


def nobody(message: bytes, timeout_seconds: float) -> list[bytes]:
    raise RuntimeError("nobody is there")


class Place(Rung[str]):
    """A rung that always loads."""

    def __init__(self, name: str, *, last: bool = False) -> None:
        self.name = name
        self.is_last_resort = last

    def poll(self) -> PollResult:
        return take("it is there")

    def load(self) -> str:
        return self.name


def test_without_agreement_the_last_resort_alone_is_tried() -> None:
    broken = Agreement(nobody)
    ladder = Ladder([Place("p2p"), Place("cache"), Place("engine", last=True)], agreement=broken)
    assert ladder.climb() == "engine"
    assert [(step.rung, step.outcome) for step in ladder.steps] == [
        ("p2p", "skipped"),
        ("cache", "skipped"),
        ("engine", "loaded"),
    ]
    assert "nobody is there" in ladder.steps[0].reason


def test_without_agreement_and_last_resort_nothing_is_loaded() -> None:
    with pytest.raises(LoadPathsExhausted, match="nobody is there"):
        Ladder([Place("p2p")], agreement=Agreement(nobody)).climb()


@pytest.mark.parametrize("text", ["", '"\\' * 1000, "é" * 1000, "\n\t\0" * 1000, "why"], ids=ascii)
def test_every_message_has_one_size(text: str) -> None:
    message = agreement._written("busy", text)
    assert len(message) == MESSAGE_BYTES
    assert agreement._read(message)[0] == "busy"
