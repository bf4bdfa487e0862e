"""An update: the places that a version may come from, tried in order, and the old version again where none gives it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from mxcore.engine import serving
from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded
from mxcore.engine.loading import load_reported
from mxcore.engine.protocol import Engine
from mxcore.engine.report import LoadReport
from mxcore.engine.rungs import rungs_of
from mxcore.engine.update.live_rung import live
from mxcore.engine.update.published_rung import PublishedRung
from mxcore.engine.update.replacement import Replacement
from mxcore.engine.update.running import Running
from mxcore.errors import UpdateFailed
from mxcore.exchange import PublishedVersion
from mxcore.load_ladder import Rung, reason_of
from mxserver.wire import MxError

__all__ = ["Outcome", "has_version", "restore", "update"]

_log = logging.getLogger(__name__)
_NOT_BUILT_HERE = "how this model was built is not known: it can only be loaded anew, by a restart"


class UpdatedEngine(Engine, Protocol):
    """An engine whose `build` and `building_state` are a `Replacement`'s."""

    @property
    def published(self) -> PublishedVersion | None:
        """The published version that its weights are of; None where they are of files or of engines."""

    def wanted_digest(self) -> str:
        """Of the checkpoint whose weights it is to have; empty where nobody here knows it. Raises MxError."""

    def check_settings(self) -> None:
        """Raises UpdateFailed where that checkpoint is of a model that is made otherwise."""


EngineOf: TypeAlias = Callable[[Replacement], UpdatedEngine]


class Outcome(NamedTuple):
    """What came of an update: whether weights were replaced (not where they are what they were), and its report."""

    changed: bool
    report: dict[str, Any]


def has_version(running: Running, version: str, new: EngineOf) -> bool:
    """Whether a running model has the weights of `version`, which it is called from then on; nothing else changes.

    While it runs, too. Raises UpdateFailed where this model cannot take them, as far as that is known before.
    """
    try:
        engine = new(Replacement(running))
        return _has(running, version, engine)
    except (MxError, OSError) as error:
        raise UpdateFailed(
            f"version {version} cannot be loaded, {running.version} stays: {reason_of(error)}"
        ) from error


def _has(running: Running, version: str, engine: UpdatedEngine) -> bool:
    """As `has_version`; raises what the engine raises."""
    _require_memory(running)
    wanted = engine.wanted_digest()
    if running.is_whole and wanted and wanted == running.checkpoint:
        running.version, running.trouble = version, ""
        return True
    if running.constructed is None:
        raise UpdateFailed(_NOT_BUILT_HERE)
    engine.check_settings()
    return False


def update(
    running: Running,
    version: str,
    new: EngineOf,
    old: EngineOf,
    *,
    paths: Sequence[str],
    anew: bool = False,
    checkpoint: str = "",
) -> Outcome:
    """Gives a running model the weights of `version`; on the engine's thread, while it computes nothing.

    `new` makes the engine whose weights those are, `old` the one whose weights it has; `paths` are the names of the
    rungs that have the new version, `checkpoint` its digest where it may be that nobody here can say it. Weights that
    the model has are not loaded again, unless `anew`. All processes of an engine call this together.

    Raises UpdateFailed; then the model has its old weights (`running.is_whole`), or it must not be used.
    """
    replacement = Replacement(running)
    try:
        replacement.checkpoint = checkpoint if anew else ""
        engine = new(replacement)
        if _has(running, version, engine) and not anew:
            _log.info("version %s has the weights that this engine has: nothing is moved", version)
            return Outcome(False, {})
        report = _load(running, replacement, engine, paths)
    except Exception as error:
        running.trouble = f"{version}: {reason_of(error)}"
        if running.lost:
            raise UpdateFailed(running.trouble) from error
        if running.is_whole:
            raise UpdateFailed(
                f"version {version} is not loaded, {running.version} still is: {reason_of(error)}"
            ) from error
        _back(running, old)
        raise UpdateFailed(
            f"version {version} is not loaded, {running.version} is again: {reason_of(error)}"
        ) from error
    running.engine, running.version, running.trouble = engine, version, ""
    running.checkpoint = report.checkpoint
    running.report = report.to_json()
    if engine.published is None:
        running.hold(None)
    return Outcome(True, running.report)


def restore(running: Running, old: EngineOf) -> None:
    """The weights that a model has lost, from wherever they are to be had: just these, though its files may be others
    by now. On the engine's thread; all processes of an engine call this together. Raises UpdateFailed.
    """
    try:
        _load_again(running, old)
    except Exception as error:
        running.trouble = f"{running.version} could not be loaded again: {reason_of(error)}"
        raise UpdateFailed(
            f"this engine has no weights and must not answer: {running.trouble}; update it, or restart it"
        ) from error
    running.trouble = ""


def _back(running: Running, old: EngineOf) -> None:
    """The old version again. Raises UpdateFailed."""
    first = running.trouble
    try:
        _load_again(running, old)
    except Exception as error:
        running.trouble = f"{first}; and {running.version} could not be loaded again: {reason_of(error)}"
        raise UpdateFailed(
            f"this engine has weights of two versions and must not answer: {running.trouble}; update it again, or "
            "restart it"
        ) from error


def _load_again(running: Running, old: EngineOf) -> None:
    replacement = Replacement(running)
    engine = old(replacement)
    is_here = not running.checkpoint or _digest_here(engine) == running.checkpoint
    replacement.checkpoint = running.checkpoint
    report = _load(running, replacement, engine, ("p2p", "uri", "cache", "engine") if is_here else ("p2p",))
    running.engine = engine
    running.report = report.to_json()


def _digest_here(engine: UpdatedEngine) -> str:
    try:
        return engine.wanted_digest()
    except (MxError, OSError):
        return ""


def _load(running: Running, replacement: Replacement, engine: UpdatedEngine, paths: Sequence[str]) -> LoadReport:
    def rungs(context: LoadContext) -> list[Rung[Loaded]]:
        if (published := engine.published) is not None:
            return [PublishedRung(context, running, published, engine.wanted_digest)]
        return _rungs(context, running, paths)

    constructed = running.constructed
    if constructed is None:
        raise UpdateFailed(_NOT_BUILT_HERE)
    with constructed.names():
        if running.is_whole:
            constructed.built.begin(running.model)
        _loaded, report = load_reported(
            engine, running.role, rungs=rungs, check=replacement.check, constructed=constructed
        )
        constructed.built.settle(running.model)
    if running.lost:
        serving.leave("its memory may still be written to", running.engine.instance, running.engine.part)
    _require_memory(running)
    running.is_whole, running.is_dropped = True, False
    return report


def _require_memory(running: Running) -> None:
    """Raises UpdateFailed where the model's memory is lost, whatever was written into it since."""
    if running.lost:
        raise UpdateFailed(
            f"something that was given up may still write to the model's memory: restart this engine ({running.lost})"
        )


def _rungs(context: LoadContext, running: Running, paths: Sequence[str]) -> list[Rung[Loaded]]:
    """Those of a load, without the ones that have another version, and none of which is taken without the others.

    Who cannot read storage waits for nobody's turn to read it, and takes none.
    """
    names = paths if set(paths) <= {"p2p"} else (*paths, "fleet")
    found = [rung for rung in rungs_of(context) if rung.name in names]
    for rung in found:
        rung.is_last_resort = False
    return live(found, context, running)
