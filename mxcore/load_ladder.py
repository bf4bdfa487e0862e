"""The ladder of places that weights can come from: which rungs there are, in which order, and what each did.

It knows neither an engine nor torch: a rung says whether it can be tried, and loads. Whatever a rung raises after it
touched the model is handled in one place: the rung undoes its changes, `restore` makes building possible again, and
the next rung begins as if nothing had happened.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from mxcore.agreement import Agreement, SiblingFailed
from mxcore.errors import LoadPathsExhausted, SignatureError
from mxserver.wire import MxError, nearest

__all__ = ["RUNGS", "Ladder", "PollResult", "Rung", "Step", "chosen_rungs", "reason_of", "skip", "take"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger(__name__)

RUNGS: dict[str, str] = {
    "p2p": "a worker that has the weights",
    "fleet": "a worker that is loading them",
    "uri": "MX_MODEL_URI",
    "cache": "the server's model cache",
    "engine": "the engine's own loader",
}
"""Every rung by its name in MX_LOAD_PATHS, in the default order, with its meaning."""


class PollResult(NamedTuple):
    """Whether a rung is tried, and why or why not."""

    takes: bool
    reason: str


def take(reason: str) -> PollResult:
    """The rung is to be tried."""
    return PollResult(True, reason)


def skip(reason: str) -> PollResult:
    """The rung is not tried."""
    return PollResult(False, reason)


class Rung(Protocol[T_co]):
    """One place to load from. One thread at a time. `name` is a key of RUNGS; its own exception leaves the ladder when
    no rung follows one that `is_last_resort`.
    """

    name: str
    is_last_resort: bool = False

    def poll(self) -> PollResult:
        """Whether to try it; cheap if possible, may wait for others. An exception is a reason to skip it."""

    def load(self) -> T_co:
        """What was loaded. Raises anything."""

    def undo(self) -> None:
        """After `load` raised: releases what it took, and reverts what it changed outside of the model."""
        return

    def done(self) -> None:
        """After `load`, when every process of the engine has loaded: what undoing would have needed can go."""
        return

    def again(self) -> bool:
        """After `undo`: whether it is polled and tried once more before the next rung."""
        return False


@dataclass(frozen=True)
class Step:
    """The outcome of a rung. `seconds` are those of loading, 0 where nothing was tried."""

    rung: str
    outcome: Literal["skipped", "failed", "loaded"]
    reason: str
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rung} {self.outcome}: {self.reason}"


def chosen_rungs(text: str | None) -> tuple[str, ...]:
    """The rungs that MX_LOAD_PATHS names, in its order; the default ones for None.

    Raises ValueError for an unknown name (with the nearest known one), for a name twice, and for no name at all.
    """
    if text is None:
        return tuple(RUNGS)
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"it names no path; there are {', '.join(RUNGS)}")
    for place, name in enumerate(names):
        if name not in RUNGS:
            near = nearest(name, RUNGS)
            hint = f"the nearest one is {near!r}" if near else f"there are {', '.join(RUNGS)}"
            raise ValueError(f"{name!r} is no path to load from; {hint}")
        if name in names[:place]:
            raise ValueError(f"{name!r} is named twice")
    return tuple(names)


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error) if isinstance(error, MxError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


class Ladder(Generic[T]):
    """Tries rungs in order, by `climb`. `steps` has the outcome of each, in order.

    After a rung failed, `restore` is called and has to make building a model possible again. `failed` is called with
    each failure. With an `agreement` all processes of an engine climb together: a rung is tried when each of them can,
    and has loaded when each of them has. What it cannot be agreed on any more is left to the last resort. For one
    thread at a time.
    """

    def __init__(
        self,
        rungs: Sequence[Rung[T]],
        *,
        restore: Callable[[], None] = lambda: None,
        failed: Callable[[Step], None] = lambda step: None,
        agreement: Agreement | None = None,
    ) -> None:
        self._agreement = agreement or Agreement()
        self._rungs = list(rungs)
        self._restore = restore
        self._failed = failed
        self.steps: list[Step] = []

    def climb(self) -> T:
        """What the first rung gives that loads.

        Raises LoadPathsExhausted with the reason of every rung when none does; if the last of them is a last resort
        and was tried, what that raised. SignatureError of any rung ends the climb.
        """
        for rung, is_last in self._attempts():
            must_try = is_last and rung.is_last_resort
            polled = self._poll(rung)
            if not polled.takes:
                self._agreement.agree(f"{rung.name} skipped: {polled.reason}")
            elif (trouble := self._agreement.agree()) and not must_try:
                polled = skip(f"not all processes of this engine can take it: {trouble}")
            if must_try:
                self._agreement.leave()  # whatever becomes of the others, there is nothing else to try
            if not polled.takes:
                self._note(Step(rung.name, "skipped", polled.reason))
                continue
            logger.info("load path %s (%s): taken: %s", rung.name, RUNGS[rung.name], polled.reason)
            started = time.monotonic()
            try:
                loaded = rung.load()
                if trouble := self._agreement.agree():
                    del loaded
                    raise SiblingFailed(trouble)
            except Exception as error:
                seconds = round(time.monotonic() - started, 6)
                if not self._agreement.trouble:
                    self._agreement.agree(reason_of(error))
                self._note(Step(rung.name, "failed", reason_of(error), seconds), error)
                if must_try or isinstance(error, SignatureError):  # what is not as signed is no matter of another place
                    raise
            else:
                rung.done()
                self.steps.append(
                    Step(rung.name, "loaded", polled.reason, seconds=round(time.monotonic() - started, 6))
                )
                return loaded
            # Outside of the except clause, so that no traceback keeps the failed model alive.
            self._clear_up(rung)
        raise LoadPathsExhausted(
            "no load path gave a model: "
            + "; ".join(str(step) for step in self.steps)
            + ". Widen MX_LOAD_PATHS, or repair one of them (`mx explain` shows what each would do)"
        )

    def _attempts(self) -> Iterator[tuple[Rung[T], bool]]:
        """Each rung, and whether none comes after it; again where it failed and wants that."""
        for place, rung in enumerate(self._rungs):
            is_tried = True
            while is_tried:
                before = len(self.steps)
                yield rung, place == len(self._rungs) - 1
                is_tried = self.steps[before].outcome == "failed" and rung.again()

    def _poll(self, rung: Rung[T]) -> PollResult:
        try:
            return rung.poll()
        except SignatureError:
            raise
        except Exception as error:  # noqa: BLE001 - the next rung may work
            self._failed(Step(rung.name, "failed", reason_of(error)))
            return skip(f"it could not be asked: {reason_of(error)}")

    def _note(self, step: Step, error: Exception | None = None) -> None:
        self.steps.append(step)
        if error is None:
            logger.info("load path %s (%s): skipped: %s", step.rung, RUNGS[step.rung], step.reason)
            return
        self._failed(step)
        if isinstance(error, MxError):
            logger.warning("load path %s failed after %.3f s: %s", step.rung, step.seconds, step.reason)
        else:
            logger.warning(
                "load path %s failed after %.3f s by an unexpected error: %s",
                step.rung,
                step.seconds,
                step.reason,
                exc_info=error,
            )

    def _clear_up(self, rung: Rung[T]) -> None:
        for what, function in (("undoing it", rung.undo), ("restoring the engine's state", self._restore)):
            try:
                function()
            except Exception as error:
                logger.exception("after load path %s failed, %s failed too", rung.name, what)
                self._failed(Step(rung.name, "failed", f"{what}: {reason_of(error)}"))
        gc.collect()  # a model is a web of cycles, and the next one wants its memory
