"""What one load is about, fixed before the first place is tried."""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from mxcore.agreement import Agreement
from mxcore.engine.model_files import UriPlace
from mxcore.engine.protocol import Engine, Fill
from mxcore.engine.report import Fallbacks
from mxcore.engine.weights import Constructed, Kind
from mxcore.metrics import REFUSALS
from mxcore.settings import WorkerSettings
from mxcore.storage.plan import Progress
from mxcore.storage.signed import SignedManifest
from mxcore.transfer.member import Membership, Refusal, Side, refusals_of
from mxcore.transfer.receive import LoadPath
from mxserver.wire.proto import p2p_pb2

__all__ = ["LoadContext", "Role"]


class Role(NamedTuple):
    """What a worker does, by the load format that its user chose.

    `otherwise` is what to do where one that only pulls finds no source. `is_fixed`: it is one of the split loaders,
    which exchange raw weights and have settings of their own.
    """

    load_format: str
    pulls: bool
    reads_storage: bool
    offers: bool
    otherwise: str = ""
    is_fixed: bool = False


@dataclass(frozen=True)
class LoadContext:
    """One load. Nothing here changes while rungs are tried; what a rung gives is a `Loaded`.

    `fallbacks` takes a line for what does not go as wanted, `at_end` what is to be closed when the rungs are through.
    Without a membership `alone` says why. `cannot_receive` is why no worker can help, whoever it is. With
    `any_checkpoint` there are no weight files here that could tell checkpoints apart. `uri_digest` is that of the
    checkpoint at `uri`, if it was found. `signed` is what has to be verified before anything is used. `agreement` is
    with the engine's other processes. `refusals` takes what is not shared (`refused`). `check` is called with a model
    that is filled, before the processes agree that they go on, and may raise. With `keeps_constructed` it is noted how
    the model was built, for an update; `constructed` is that of a model which runs already.
    """

    engine: Engine
    role: Role
    settings: WorkerSettings
    fallbacks: Fallbacks
    at_end: ExitStack
    report_path: str = ""
    rank: int = 0
    uri: UriPlace | None = None
    uri_digest: str | None = None
    membership: Membership | None = None
    alone: str = "this worker could not join"
    cannot_receive: str = ""
    any_checkpoint: bool = False
    signed: SignedManifest | None = None
    agreement: Agreement = field(default_factory=Agreement)
    refusals: list[Refusal] = field(default_factory=list)
    check: Fill = lambda model: None
    keeps_constructed: bool = False
    constructed: Constructed | None = None

    @property
    def kind(self) -> Kind:
        """Which weights are exchanged."""
        if self.role.is_fixed:
            return "raw"
        if self.settings.layout != "auto":
            return self.settings.layout
        return "processed" if self.engine.processed_weights_move else "raw"

    def device_of(self, kind: Kind) -> torch.device:
        """Where weights of a kind are. Those that are to replace a model's are staged in host memory."""
        return self.engine.device if self.constructed is None or kind == "processed" else torch.device("cpu")

    @property
    def kept_kinds(self) -> tuple[Kind, ...]:
        """Which weights are offered."""
        if not self.role.offers or self.membership is None:
            return ()
        keep = self.settings.source_keep
        if keep == "both":
            return ("processed", "raw")
        return (self.kind if keep is None else keep,)

    @property
    def what(self) -> str:
        """What is loaded, for messages."""
        name = self.membership.identity.model_name if self.membership is not None else self.engine.model
        part = f" ({self.engine.part})" if self.engine.part else ""
        return f"{self.kind} weights of {name}{part}, rank {self.rank}"

    @property
    def ranks_wanted(self) -> int:
        """MX_EXPECTED_WORKERS, or all that hold a part of the model."""
        return self.settings.expected_workers or self.engine.world_size()

    def identity(self, kind: Kind, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        """What this worker's weights are: by a checkpoint's digest, or else by the engine's files, as they are."""
        made = self.engine.identity(kind, self.settings.model_revision, checkpoint)
        named = self.settings.model_name if self.role.is_fixed else ""
        made.model_name = named or self.settings.model_name_override or made.model_name
        return made

    def refused(self, side: Side, why: BaseException | Refusal) -> None:
        """Counts weights that are not offered, or not taken, for the report and at the server."""
        found = [why] if isinstance(why, Refusal) else refusals_of(side, why)
        self.refusals.extend(found)
        for refusal in found:
            REFUSALS.add(refusal.side, refusal.reason)
        if self.membership is not None:
            self.membership.refused(found)

    def offering(self, what: str) -> AbstractContextManager[None]:
        """As `fallbacks.attempt`, around what is needed to offer weights."""
        return self.fallbacks.attempt(what, partial(self.refused, "offer"))

    def refusal_counts(self) -> dict[str, dict[str, int]]:
        """Of this load, by side and reason."""
        counts: dict[str, Counter[str]] = {}
        for refusal in self.refusals:
            counts.setdefault(refusal.side, Counter())[refusal.reason] += 1
        return {side: dict(reasons) for side, reasons in counts.items()}

    def new_membership(self, identity: p2p_pb2.SourceIdentity) -> Membership:
        """This worker at the server, not joined yet."""
        signed = self.signed.digest if self.signed is not None else ""
        return Membership(
            self.settings,
            identity,
            self.rank,
            self.engine.accelerator,
            signed_manifest=signed,
            replica=self.replica,
        )

    @property
    def replica(self) -> str:
        """Which engine this rank is part of, the same for all its ranks; empty where that is not known.

        Engines' own names are short, or the same in each process: where all ranks are in one place, that is said too.
        """
        engine = self.engine
        ranks = engine.world_size()
        if not engine.instance or ranks > engine.ranks_on_node():
            return engine.instance
        here = f"{socket.gethostname()}-{os.getpid()}" if ranks == 1 else socket.gethostname()
        return f"{engine.instance}-{here}"

    def loading(self, path: LoadPath) -> AbstractContextManager[Progress]:
        """Around a load that is no transfer: what it gives is to be told how far the load is, for the server's page."""
        if self.membership is None:
            return nullcontext(lambda done_bytes, total_bytes: None)
        return self.membership.loads.loading(path)
