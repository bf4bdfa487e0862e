"""What a rung gives, and how: a model is built, filled, processed, and looked at for what can be offered of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from mxcore.agreement import SiblingFailed
from mxcore.engine.context import LoadContext
from mxcore.engine.model_files import find_checkpoint
from mxcore.engine.protocol import Files, Fill, Source, Streamed
from mxcore.engine.report import LoadedPart, StepSeconds, StoredPath
from mxcore.engine.weights import Built, Constructed, MarkUninitialised, Weights
from mxcore.errors import LayoutUnsupported, MemoryDamaged, SignatureError
from mxcore.storage.load import ReadRecord
from mxcore.storage.plan import Progress
from mxcore.storage.remote import LocalFolder
from mxcore.storage.signed import VerifiedFiles
from mxcore.transfer.member import Refusal
from mxcore.transfer.receive import LoadPath

__all__ = ["BuiltModel", "Keeping", "Loaded", "Stored", "built", "load_stored", "verified_of"]

_log = logging.getLogger(__name__)
_COMPARE_THREADS = 4


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, what of it can be offered, and what the report says of it.

    `checkpoint` is the digest of what was loaded; None: of the engine's own files. `received_from`: the bytes that
    each worker gave, by its id; empty for a model from storage. `constructed`: how it was built, where that was noted.
    """

    model: nn.Module
    kept: tuple[Weights, ...]
    checkpoint: str | None
    part: LoadedPart
    constructed: Constructed | None = None
    received_from: Mapping[str, int] = field(default_factory=dict)


class Stored(NamedTuple):
    """What is to be read, and `look`, which gives the digest of that checkpoint as it is now; None: it has none."""

    source: Source
    look: Callable[[], str | None]


class Keeping:
    """Looks at a model for what is to be offered of it. For one model; what cannot be offered is a fallback's line."""

    def __init__(self, context: LoadContext) -> None:
        self._context = context
        self._kept: list[Weights] = []

    def built(self, model: nn.Module) -> Built | None:
        """Before filling: what the constructor made; None where that cannot be said, and nothing is offered then."""
        if not self._context.kept_kinds:
            return None
        found: list[Built] = []
        with self._context.offering("looking at the model before it is filled"):
            engine = self._context.engine
            found.append(Built(model, self._context.device_of("raw"), engine.configuration))
        return found[0] if found else None

    def filled(self, model: nn.Module, built: Built | None, given: Weights | None = None) -> None:
        """Before processing. `given` are weights that were received, or will be after processing."""
        context = self._context
        for kind in context.kept_kinds:
            if given is not None and given.kind == kind:
                self._kept.append(given)
            elif kind == "raw" and given is not None:
                context.fallbacks.append("keeping raw weights: this worker received processed ones")
            elif built is not None:
                weights = Weights(kind, context.device_of(kind))
                with context.offering(f"collecting {kind} weights"):
                    weights.loaded(model, built)
                    if kind == "processed" and context.constructed is not None:
                        weights.runs(model, context.constructed.built)
                    self._kept.append(weights)

    @property
    def compares_reads(self) -> bool:
        """Whether what is read from files is to be compared with the memory that is offered: of raw weights here."""
        return "raw" in self._context.kept_kinds and self._context.engine.device.type == "cpu"

    def compare(self, record: ReadRecord) -> None:
        """After `filled`: raw weights are what was read. Where memory is broken it is repaired, and nothing offered."""
        context = self._context
        for weights in [weights for weights in self._kept if weights.kind == "raw"]:
            layout, placement = weights.layout, weights.placement
            if layout is None or placement is None:
                continue
            with context.fallbacks.attempt("comparing the weights with what was read"):
                memory = list(zip(placement.addresses, layout.extent_bytes, strict=True))
                found = record.check(memory, threads=_COMPARE_THREADS)
                _log.info("%d of %d bytes were compared with what was read", found.compared_bytes, layout.total_bytes)
                if found.changed_bytes:
                    _log.info("%d of them were changed by the engine's loader", found.changed_bytes)
                if found.repaired_bits:
                    self._kept.remove(weights)
                    damaged = MemoryDamaged(
                        f"{found.repaired_bits} bits in memory were not what was read from the files; they are written "
                        "again, and these weights are not offered: test this machine's memory"
                    )
                    context.refused("offer", damaged)
                    raise damaged

    def processed(self, model: nn.Module) -> tuple[Weights, ...]:
        """After processing: what can be offered, complete."""
        complete = []
        for weights in self._kept:
            if weights.received is not None and weights.kind == "processed":
                complete.append(weights)
                continue
            with self._context.offering(f"collecting {weights.kind} weights"):
                weights.processed(model)
                if weights.kind == "raw":
                    beside = weights.bytes_beside(model)
                    _log.info(
                        "raw weights are kept for other workers: %d bytes beside the model (MX_SOURCE_KEEP)", beside
                    )
                complete.append(weights)
        return tuple(complete)


class BuiltModel(NamedTuple):
    """A model, the seconds of its steps, and how it was built, where that was to be noted and could be."""

    model: nn.Module
    steps: StepSeconds
    constructed: Constructed | None


def _constructed(context: LoadContext, model: nn.Module) -> list[Constructed]:
    """How the model was built; empty where it cannot be said, so that it cannot be updated, and nothing else."""
    found: list[Constructed] = []
    with context.fallbacks.attempt("noting how the model was built, for updates"):
        try:
            found.append(Constructed(model, context.engine.device, context.engine.configuration))
        except LayoutUnsupported as error:
            _log.info("this model takes no other version's weights while it runs: %s", error)
    return found


def built(context: LoadContext, fill: Fill, *, with_placeholder: bool = False) -> BuiltModel:
    """`Engine.build`, with the seconds of its steps. Raises what that raises. A placeholder is no weights.

    Processing, which may have collectives, begins when every process of the engine has filled its model; SiblingFailed
    where one could not.
    """
    times = [time.monotonic()]
    constructing = ExitStack()
    noted: list[Constructed] = []

    def timed(model: nn.Module) -> None:
        constructing.close()
        if context.keeps_constructed:
            noted.extend(_constructed(context, model))
        times.append(time.monotonic())
        fill(model)
        if noted and not with_placeholder:
            noted[0].filled(model)
        context.check(model)
        times.append(time.monotonic())
        if trouble := context.agreement.agree():
            raise SiblingFailed(trouble)

    with constructing:
        constructing.enter_context(MarkUninitialised())
        model = context.engine.build(timed)
    times.append(time.monotonic())
    names = ("build", "fill", "process")
    steps = StepSeconds(
        (name, round(ended - began, 6)) for name, began, ended in zip(names, times, times[1:], strict=False)
    )
    return BuiltModel(model, steps, noted[0] if noted else None)


def verified_of(context: LoadContext, folder: Path | None) -> VerifiedFiles | None:
    """What files of a folder, or the engine's own, are verified by, its small ones verified; None where none need be.

    Raises SignatureError, and what reading raises.
    """
    if context.signed is None:
        return None
    engine = context.engine
    folder = folder or find_checkpoint(engine.model, engine.revision, engine.download_dir).folder
    if folder is None:
        raise SignatureError(
            f"{engine.model} is not on this machine, and what is downloaded while it loads is not verified: "
            "download it first"
        )
    verified = VerifiedFiles(context.signed, LocalFolder(folder))
    verified.check_others()
    return verified


def load_stored(
    context: LoadContext,
    path: StoredPath,
    load_path: LoadPath,
    opened: Callable[[Progress], Stored],
    *,
    reading_alone: bool = True,
) -> Loaded:
    """A model from storage; what of it is offered is offered as what was read, or not at all where the files changed.

    `load_path` is what the server hears. The report's seconds are those of reading, or of all that is done here where
    `reading_alone` is False. Raises what `opened`, the first look and the engine raise.
    """
    keeping = Keeping(context)
    started = time.monotonic()
    seconds = 0.0
    with context.loading(load_path) as progress:
        source, look = opened(progress)
        before = look()
        record = ReadRecord() if keeping.compares_reads else None
        if isinstance(source, Files):
            source = replace(source, record=record, verified=verified_of(context, source.folder))
        verified = source.verified

        def fill(model: nn.Module) -> None:
            nonlocal seconds
            before = keeping.built(model)
            began = time.monotonic()
            context.engine.fill(model, source, context.settings, progress)
            seconds = time.monotonic() - began
            if verified is not None:
                verified.finish()
                _log.info("%s", verified.told(seconds))
            keeping.filled(model, before)
            if record is not None:
                keeping.compare(record)

        model, steps, constructed = built(context, fill)
    if not reading_alone:
        seconds = time.monotonic() - started
    with steps.step("keep"):
        kept = keeping.processed(model)
        checkpoint = _seen_again(context, before, look) if kept else before
        if checkpoint is None:
            kept = ()
    size_bytes = source.checkpoint.total_bytes if isinstance(source, Streamed) else 0
    part = LoadedPart(path=path, layout=context.kind, bytes=size_bytes, seconds=round(seconds, 6), steps=steps)
    if kept and kept[0].layout is not None:
        part = replace(part, tensors=len(kept[0].found.tensors), bytes=kept[0].layout.total_bytes)
    return Loaded(model, kept, checkpoint, part, constructed)


def _seen_again(context: LoadContext, before: str | None, look: Callable[[], str | None]) -> str | None:
    """The digest of what was read; None, and a fallback's line, where that cannot be said."""
    found: list[str | None] = []
    with context.fallbacks.attempt("looking at the weight files again"):
        found.append(look())
    after = found[0] if found else None
    if before is None or after is None:
        why = "nobody can say which weight files were read: not offered"
    elif before and after != before:  # "": they were downloaded just now
        why = f"the weight files of {context.engine.model} changed while they were read: not offered"
    else:
        return after
    context.fallbacks.append(why)
    context.refused("offer", Refusal("offer", "file_changed", why))
    return None
