"""Tensors that other processes publish, fetched into new memory or into tensors that exist."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import util
from types import TracebackType
from typing import Any, Self

from mxcore.errors import LayoutMismatch, SourceRefused, SourceUnreachable, TransferError
from mxcore.exchange.held_version import CHUNK_BYTES_OF_PUBLISHED
from mxcore.exchange.tensors import (
    NewTensors,
    Tensors,
    by_name,
    copy_into,
    described,
    framework_of,
    synchronize,
)
from mxcore.exchange.versions import identity_of, settings_of, version_text, wait_for_version
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import Framework, chosen_framework
from mxcore.transfer.layout import Chunks, Layout, LayoutTensor, Placement, build_layout
from mxcore.transfer.member import Directory, Membership, current_place, manifest_of
from mxcore.transfer.receive import ProgressCallback, ReceiveReport
from mxserver.wire import SettingError
from mxserver.wire.calls import ServerClient

__all__ = ["Fetched", "fetch"]

_AGAIN_SECONDS = 0.2
_NAMED = 5


class Fetched(Mapping[str, Any]):
    """Tensors by name, sorted, each byte verified; they stay what they are after `close`.

    With `share`, other processes fetch from this one until `close` or the end of the `with` block: as long they must
    not be changed. `name` and `version` are what was fetched; `report` has bytes, seconds, the route, who gave how much
    (`bytes_from`) and who failed. Thread-safe.
    """

    def __init__(
        self, name: str, version: str, tensors: Mapping[str, Any], report: ReceiveReport, member: Membership | None
    ) -> None:
        self.name = name
        self.version = version
        self.report = report
        self._tensors = tensors
        self._member = member
        self._at_exit = util.Finalize(None, member.close, exitpriority=100) if member is not None else None

    @property
    def sharing(self) -> bool:
        """Whether others can fetch from this process."""
        return self._member is not None and self._member.holder is not None

    def close(self) -> None:
        """Ends sharing: takes no new readers, and waits for those that read. Idempotent; never raises."""
        if self._at_exit is not None and self._member is not None:
            self._at_exit.cancel()
            self._member.close()

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        shared = ", shared" if self.sharing else ""
        return f"<Fetched {self.name!r} version {self.version}: {len(self)} tensors, {self.report.bytes} bytes{shared}>"


@dataclass(frozen=True)
class _Target:
    """Where a fetch goes: the placement of the layout's extents, and the chunks that are received (None: all).

    Holding it holds the memory. `new` is what was made for it; None: bytes go straight into the tensors `into`.
    """

    placement: Placement
    only: int | None
    wanted: tuple[LayoutTensor, ...]
    into: Mapping[str, Any] | None
    new: NewTensors | None
    device: str

    def tensors(self) -> dict[str, Any]:
        """By name, once everything has arrived. Raises DestinationMismatch."""
        into, new = self.into, self.new
        if new is not None:
            if into is None:
                found = {info.name: new.tensor(info) for info in self.wanted}
                return found if self.device == new.device else {name: it.to(self.device) for name, it in found.items()}
            for info in self.wanted:
                copy_into(into[info.name], new.tensor(info, into[info.name]), info.name)
            synchronize(into)
        return {info.name: into[info.name] for info in self.wanted} if into is not None else {}


class _Memory:
    """What a fetch fills: new tensors of a framework on a device, or those that are given."""

    def __init__(self, framework: Framework | None, device: str, into: Mapping[str, Any] | None = None) -> None:
        """Raises SettingError, LayoutUnsupported."""
        self._framework = chosen_framework(framework)
        self._device = device
        self._into = into
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise SettingError(f"device={device!r}: host memory (cpu) and CUDA devices (cuda:0) are supported")
        if device != "cpu" and self._framework != "torch":
            raise SettingError(
                f"device={device!r} needs torch; {self._framework} has host memory only (or give into= arrays there)"
            )
        if into is not None:
            synchronize(into)
            self._layout, self._placement = build_layout("raw", described(into, filled=True))

    @classmethod
    def of(cls, into: Mapping[str, Any]) -> Self:
        """That of tensors which exist."""
        return cls(framework_of(into), "cpu", into)

    def target(self, layout: Layout, chunk_bytes: int, names: Collection[str] | None) -> _Target:
        """For a layout of others. Raises LayoutMismatch for names, shapes or dtypes that differ; HostMemoryError."""
        wanted = self._wanted(layout, names)
        if self._into is not None and names is None and self._layout.fingerprint == layout.fingerprint:
            return _Target(self._placement, None, wanted, self._into, None, self._device)
        only, extents = None, None
        if names is not None:
            chunks = Chunks(layout, chunk_bytes)
            only = chunks.covering({info.extent for info in wanted if info.extent is not None})
            extents = chunks.extents_of(only)
        device = self._device if names is None and self._into is None else "cpu"
        new = NewTensors(layout, self._framework, device, extents)
        return _Target(new.placement, only, wanted, self._into, new, self._device)

    def _wanted(self, layout: Layout, names: Collection[str] | None) -> tuple[LayoutTensor, ...]:
        there = {info.name: info for info in layout.tensors}
        wanted = there.keys() if names is None else frozenset(names)
        differences = [f"{name}: not published" for name in sorted(wanted - there.keys())]
        if self._into is not None:
            here = {info.name: info for info in self._layout.tensors}
            differences += [f"{name}: published, and not here" for name in sorted(wanted & there.keys() - here.keys())]
            differences += [f"{name}: only here" for name in sorted(here.keys() - wanted)]
            for name in sorted(wanted & there.keys() & here.keys()):
                mine, its = here[name], there[name]
                if (mine.dtype, mine.shape) != (its.dtype, its.shape):
                    differences.append(f"{name}: {mine.dtype} {mine.shape} here, {its.dtype} {its.shape} there")
        if differences:
            more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
            raise LayoutMismatch(
                f"other tensors are published than are wanted: {'; '.join(differences[:_NAMED])}{more}"
            )
        return tuple(info for info in layout.tensors if info.name in wanted)


def fetch(
    name: str,
    version: int | str | None = None,
    *,
    into: Tensors | None = None,
    names: Collection[str] | None = None,
    rank: int = 0,
    newer_than: int | None = None,
    wait_seconds: float = 0.0,
    framework: Framework | None = None,
    device: str = "cpu",
    share: bool = False,
    progress: ProgressCallback | None = None,
    server: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Fetched:
    """Takes what is published under `name` and `version` from all processes that have it, and verifies every byte.

    Without a `version`, the newest: the highest number, or one above `newer_than`. It is waited for at most
    `wait_seconds`. `names` takes some of the tensors, and little more than their bytes travels.

    New tensors are made by `framework` (torch where it is installed, else numpy, which gets types that it lacks as
    bytes) on `device`, torch's name of one; `names` on a device pass host memory. With `into` (what `publish` takes),
    those are filled, and must have exactly the names that are wanted, with the same shapes and dtypes:
    straight where they also lie in memory as the publisher's do, as fresh contiguous ones do, else by a copy in host
    memory.

    While it receives, this process already gives others what it has; with `share` also afterwards, until the result is
    closed. `progress` is called with (bytes verified, bytes in all), on any thread. `rank`, `server`, `settings` as
    for `publish`. Call it after a fork, from any thread.

    Raises, and then nothing arrives any more; what `into` holds is undefined once bytes were on their way:
        NoSource, SourceUnreachable: nobody has the version (in time), or any more.
        LayoutMismatch: other names, shapes or dtypes than are wanted here, or than another publisher has, with the
            first ones that differ.
        ChunksMissing, DigestMismatch, TransferError: holders failed, gave wrong bytes, or have different ones.
        SettingError, ServerUnreachable, ServerRefused, LayoutUnsupported, DestinationMismatch, HostMemoryError.
    """
    if isinstance(names, str) or (share and names is not None):
        raise SettingError("names is a collection of names; with share=True it is left out, as others want all tensors")
    if version is not None and newer_than is not None:
        raise SettingError(f"version={version!r} and newer_than={newer_than!r} exclude each other")
    wanted = None if version is None else version_text(version)
    identity_of(name, wanted or "")  # refused before anything is asked
    chosen = settings_of(server, settings)
    memory = _Memory(framework, device) if into is None else _Memory.of(by_name(into))
    deadline = time.monotonic() + wait_seconds
    while True:
        left = max(0.0, deadline - time.monotonic())
        with ServerClient(str(chosen.server_address), timeout_seconds=chosen.server_timeout_seconds) as client:
            found = wait_for_version(client, name, wanted, rank=rank, newer_than=newer_than, wait_seconds=left)
        receive = _Receive(chosen, name, found, rank)
        try:
            return receive.run(memory, names, progress, share=share)
        except SourceUnreachable:  # who had it has just left: somebody else may have it, or a newer version
            if time.monotonic() >= deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


class _Receive:
    """One try to take a version from those who have it."""

    def __init__(self, settings: WorkerSettings, name: str, version: str, rank: int) -> None:
        self._settings = settings
        self._name = name
        self._version = version
        self._rank = rank
        self._identity = identity_of(name, version)

    def run(
        self, memory: _Memory, names: Collection[str] | None, progress: ProgressCallback | None, *, share: bool
    ) -> Fetched:
        """Raises as `fetch`."""
        layout, chunk_bytes = self._published_layout()
        target = memory.target(layout, chunk_bytes, names)
        placement, only = target.placement, target.only
        kind = placement.device_type
        member = Membership(self._settings, self._identity, self._rank, kind, chunk_bytes=chunk_bytes)
        try:
            member.join(required=True)
            sources = member.find_sources(receiving=True)
            relay_from = target if only is None else None
            report = member.receive(
                layout, placement, {}, sources, progress, relay_from=relay_from, only=only, keep_alive=target
            )
            if other := [failure for failure in report.failures if LayoutMismatch.code in failure]:
                raise LayoutMismatch(f"other tensors are published under this name and version too: {other[0]}")
            tensors = target.tensors()
            if share:
                member.serve(layout, placement, {}, report.digests, keep_alive=target)
        except BaseException:
            member.close()
            raise
        if not share:
            member.close()
        return Fetched(self._name, self._version, tensors, report, member if share else None)

    def _published_layout(self) -> tuple[Layout, int]:
        """How the tensors lie at whoever has them, and their chunks' bytes. Raises TransferError, WireError."""
        failure: TransferError = SourceUnreachable(f"nobody has version {self._version} of {self._name!r} any more")
        settings = self._settings
        with ServerClient(str(settings.server_address), timeout_seconds=settings.server_timeout_seconds) as client:
            holders = Directory(client, "", self._rank, partial(current_place, settings)).holders(self._identity)
        for source in holders:
            try:
                manifest = manifest_of(source, timeout_seconds=settings.stall_timeout_seconds)
                if manifest.chunk_bytes not in CHUNK_BYTES_OF_PUBLISHED:
                    raise SourceRefused(f"worker {source.worker_id} has chunks of {manifest.chunk_bytes} bytes")
                return manifest.layout, manifest.chunk_bytes
            except TransferError as error:
                failure = error
        raise failure
