"""What an engine gives so that its models are loaded and shared (the Protocol `Engine`), and what it reads from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from mxcore.agreement import Gather
from mxcore.engine.lazy_tensors import Needed
from mxcore.engine.serving import EngineWatch
from mxcore.engine.weights import Kind
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import ReadRecord
from mxcore.storage.plan import Progress
from mxcore.storage.signed import VerifiedFiles
from mxserver.wire.proto import p2p_pb2

__all__ = ["Engine", "Files", "Fill", "Source", "Streamed"]

Fill: TypeAlias = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Files:
    """Weight files: the engine's own, or those of `folder`. With `needed` (`lazy_weights`), only that is read.

    `record` is for `lazy_weights`, which notes there what it read, and `verified` too: it verifies what was signed.
    """

    folder: Path | None = None
    needed: Needed | None = None
    record: ReadRecord | None = None
    verified: VerifiedFiles | None = None


@dataclass(frozen=True)
class Streamed:
    """A checkpoint that is elsewhere.

    `tensors(names, progress)` yields (name, tensor) of the names, or of all for None; each tensor is good until the
    next but one is asked for. `verified` verifies them, where they have to be what was signed.
    """

    checkpoint: Checkpoint
    tensors: Callable[[Collection[str] | None, Progress], Iterator[tuple[str, torch.Tensor]]]
    verified: VerifiedFiles | None = None


Source: TypeAlias = Files | Streamed


class Engine(Protocol):
    """One model in one process of an engine. All calls come from the thread that loads."""

    @property
    def model(self) -> str:
        """What the user named: a folder, or a model of the hub."""

    @property
    def part(self) -> str:
        """Which of the engine's models it is, in a word ("draft"); empty for the one that the engine is about."""

    @property
    def revision(self) -> str | None:
        """Of the model on the hub; None: the newest."""

    @property
    def download_dir(self) -> str | None:
        """The hub's cache, where it is not in its usual place."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Worker settings that the user gave the engine, by name; they win over the environment. Also `report_path`."""

    @property
    def device(self) -> torch.device:
        """Where all weights are."""

    @property
    def accelerator(self) -> str:
        """The device's name, as the record on the server shows it."""

    @property
    def instance(self) -> str:
        """Which of this process' engines it is, as `watch` tells it; empty where that is not known."""

    @property
    def own_loader(self) -> str:
        """What loads its files, for the log."""

    @property
    def configuration(self) -> Sequence[object]:
        """Objects that describe the run. What hangs on them, outside of modules, is no weight and no structure."""

    @property
    def processed_weights_move(self) -> bool:
        """False where processing packs weights away so that nothing can read them back: raw ones are exchanged."""

    def building_state(self) -> Callable[[], None]:
        """Remembers what building a model changes beside it; the result restores that, so that another can be built."""

    def build(self, fill: Fill) -> nn.Module:
        """Builds the model, calls `fill` with it, processes it: ready to run. Raises what `fill` raises."""

    def fill(self, model: nn.Module, source: Source, settings: WorkerSettings, progress: Progress) -> int:
        """Within `build`: fills the model from a checkpoint; bytes that were read from files by mxcore."""

    def fill_placeholder(self, model: nn.Module) -> None:
        """Within `build`: values with which processing does no harm. Other values come after processing."""

    def finish_filling(self, model: nn.Module) -> None:
        """Within `build`, for a model that is filled by other workers: what `fill` does when it has all tensors.

        What it makes of the tensors that are there is of no account: those of the workers come over it. Never raises.
        """

    def identity(self, kind: Kind, revision: str, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        """What must match for weights to be interchangeable (wire.md).

        `checkpoint` is the digest of weights that come from elsewhere; None: that of the engine's own files is made.
        `revision`: what the settings say where the engine names none. Raises MxError for a malformed weight file.
        """

    def rank(self) -> int:
        """Which part of the model is here: equal ranks of equal identities have equal weights."""

    def world_size(self) -> int:
        """Processes that hold one copy of the model together."""

    def ranks_on_node(self) -> int:
        """Processes of this engine on this machine."""

    def barrier(self, timeout_seconds: float) -> str:
        """Waits until all processes of this engine are here; what went wrong, else an empty text."""

    def siblings(self) -> Gather | None:
        """How this process talks to all that share collectives with it while they load; None: it is alone.

        Called once a load, by each of them. Raises RuntimeError when they do not come.
        """

    def offers_until(self) -> str:
        """What will end this engine's offers before it ends itself, for the report; empty: nothing that is known."""

    def loses_memory(self) -> str | None:
        """A mode in which weights vanish or move and nobody tells us: then they are not offered."""

    def watch(self, watch: EngineWatch) -> None:
        """Has `watch` told before weights are changed, sleep or vanish, and after they woke up. Idempotent."""
