"""The models that this process' engines run, and what their weights are."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mxcore.engine import serving
from mxcore.engine.context import Role
from mxcore.engine.loading import load_reported
from mxcore.engine.protocol import Engine
from mxcore.engine.weights import Constructed
from mxcore.exchange import HeldVersion

__all__ = ["Running", "forget", "load_running", "running_of"]

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_running: dict[tuple[str, str], Running] = {}


@dataclass
class Running:
    """One model of an engine. Changed by `update` alone, on the engine's thread.

    `engine` is what the weights are of, `checkpoint` their digest (empty where nobody knows it), `version` what the
    user calls them, `place` where an update finds them again. `is_whole` is False from the first byte of an update that
    is written until its last check: the engine must not answer then. `trouble` is why the last update failed, `report`
    that of the last load or update, `held` what has to stay in memory beside the model until the next one. `published`
    is the version that was taken from publishers, as it came; None where the weights are of another place.
    `is_dropped`: the engine sleeps without its weights. `lost` is why its memory can never be used again: something may
    still write there.
    """

    model: nn.Module
    engine: Engine
    role: Role
    constructed: Constructed | None
    checkpoint: str = ""
    version: str = ""
    place: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True
    trouble: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    held: object = None
    lost: str = ""
    published: HeldVersion | None = None
    is_dropped: bool = False

    def begin_writing(self) -> None:
        """Before the first byte of the model is changed: nobody reads it any more, and nothing may be answered."""
        if self.is_whole:
            self.is_whole = False
            serving.leave("the engine's weights are replaced", self.engine.instance, self.engine.part)

    def hold(self, published: HeldVersion | None) -> None:
        """Lets go of the published version that was held, and holds this one, or none."""
        before, self.published = self.published, published
        if before is not None and before is not published:
            before.close()

    def drop(self) -> None:
        """Before a sleep that keeps no weights: they are taken anew when the engine wakes up."""
        if self.is_whole and self.constructed is not None:
            with self.constructed.names():
                self.constructed.built.begin(self.model)
        self.begin_writing()
        self.is_dropped = True
        self.trouble = "the engine sleeps, and its weights are dropped"

    def state(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "version": self.version,
            "checkpoint": self.checkpoint,
            "place": self.place,
            "part": self.engine.part,
            "ready": self.is_whole,
            "trouble": self.trouble,
        }


def load_running(engine: Engine, role: Role) -> nn.Module:
    """As `load`; the model can be given new weights later (`update`), while the engine runs."""
    loaded, report = load_reported(engine, role, keeps_constructed=True)
    if engine.instance:
        constructed = _settled(loaded.constructed, loaded.model)
        running = Running(loaded.model, engine, role, constructed, report.checkpoint)
        running.version = engine.revision or engine.model
        running.report = report.to_json()
        with _lock:
            _running[engine.instance, engine.part] = running
    return loaded.model


def _settled(constructed: Constructed | None, model: nn.Module) -> Constructed | None:
    """Once the model is loaded, before it runs; None where nobody could say later what of it is a weight."""
    try:
        if constructed is not None:
            constructed.built.settle(model)
    except Exception:  # noqa: BLE001 - the engine starts all the same
        _log.exception("this model takes no other version's weights while it runs")
        return None
    return constructed


def running_of(instance: str, part: str = "") -> Running | None:
    """A model of one of this process' engines, if it was loaded by `load_running`. Thread-safe."""
    with _lock:
        return _running.get((instance, part))


def forget(instance: str) -> None:
    """When the engine ends: its models are not held any more. Idempotent, thread-safe."""
    with _lock:
        gone = [_running.pop(key) for key in [key for key in _running if key[0] == instance or not instance]]
    for running in gone:
        running.hold(None)
