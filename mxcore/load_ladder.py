"""The ladder of places that weights can come from: which rungs there are, in which order, and what became of each.

Knows neither an engine nor torch: a rung is asked whether it can be taken, and loads. Whatever a rung raises after it
touched the model is met in one place: the rung undoes what it did, `restore` makes building possible again, and the
next rung begins as if nothing had been.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from mxcore.errors import LoadPathsExhausted
from mxserver.wire.errors import MxError
from mxserver.wire.nearest import nearest

__all__ = ["RUNGS", "Ladder", "Look", "Rung", "Step", "chosen_rungs", "reason_of", "skip", "take"]

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
"""Every rung by its name in MX_LOAD_PATHS, in the default order, with what it stands for."""


class Look(NamedTuple):
    """Whether a rung is taken, and the reason for either."""

    takes: bool
    reason: str


def take(reason: str) -> Look:
    """The rung is to be tried."""
    return Look(True, reason)


def skip(reason: str) -> Look:
    """The rung is left out."""
    return Look(False, reason)


class Rung(Protocol[T_co]):
    """One place to load from. One thread at a time."""

    @property
    def name(self) -> str:
        """A key of RUNGS."""

    @property
    def tries(self) -> int:
        """How often it is looked at and tried before the next one."""

    @property
    def is_last_resort(self) -> bool:
        """Whether its own exception leaves the ladder when no rung follows."""

    def look(self) -> Look:
        """Cheap where it can be; may wait for others. What it raises is a reason to skip."""

    def load(self) -> T_co:
        """The loaded model. Raises anything."""

    def undo(self) -> None:
        """After `load` raised: gives back what it took, and what it changed beside the model."""


@dataclass(frozen=True)
class Step:
    """What became of a rung. `seconds` are those of loading, 0 where nothing was tried."""

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

    Raises ValueError for a name that is none, with the nearest right one, for a name twice, and for no name at all.
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
    """Rungs in the order in which they are tried, by `climb`. `steps` tells what became of each, in order.

    `restore` is called before a rung loads after another one's failure, and has to make building a model possible
    again. `failed` is told of each failure. One thread at a time.
    """

    def __init__(
        self,
        rungs: Sequence[Rung[T]],
        *,
        restore: Callable[[], None] = lambda: None,
        failed: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._rungs = list(rungs)
        self._restore = restore
        self._failed = failed
        self.steps: list[Step] = []

    def climb(self) -> T:
        """The model of the first rung that loads one.

        Raises LoadPathsExhausted with the reason of every rung when none does; if the last of them is a last resort
        and was tried, what that raised.
        """
        for rung, is_last in self._attempts():
            look = self._look(rung)
            if not look.takes:
                self._note(Step(rung.name, "skipped", look.reason))
                continue
            logger.info("load path %s (%s): taken: %s", rung.name, RUNGS[rung.name], look.reason)
            started = time.monotonic()
            try:
                model = rung.load()
            except Exception as error:
                seconds = round(time.monotonic() - started, 6)
                self._note(Step(rung.name, "failed", reason_of(error), seconds), error)
                if is_last and rung.is_last_resort:
                    raise
            else:
                self.steps.append(Step(rung.name, "loaded", look.reason, seconds=round(time.monotonic() - started, 6)))
                return model
            # Out of the except clause, so that no traceback holds on to the model that was given up.
            self._clear_up(rung)
        raise LoadPathsExhausted(
            "no load path gave a model: "
            + "; ".join(str(step) for step in self.steps)
            + ". Widen MX_LOAD_PATHS, or mend one of them (`mx explain` shows what each would do)"
        )

    def _attempts(self) -> Iterator[tuple[Rung[T], bool]]:
        """Each rung, and whether none comes after it; again while it failed and has tries left."""
        for place, rung in enumerate(self._rungs):
            for _ in range(rung.tries):
                before = len(self.steps)
                yield rung, place == len(self._rungs) - 1
                if self.steps[before].outcome == "skipped":
                    break

    def _look(self, rung: Rung[T]) -> Look:
        try:
            return rung.look()
        except Exception as error:  # noqa: BLE001 - the next rung may do
            self._failed(Step(rung.name, "failed", reason_of(error)))
            return skip(f"it could not be looked at: {reason_of(error)}")

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
                "load path %s failed after %.3f s by no fault that we know: %s",
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
