"""Tensors of this process for others to fetch, under a name and a version."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from multiprocessing import util
from types import TracebackType
from typing import Any, Self

from mxcore.exchange.device_arrays import copy_extents_to_host
from mxcore.exchange.tensors import NewTensors, Tensors, by_name, described, framework_of, synchronize
from mxcore.exchange.versions import identity_of, published_uri, settings_of, version_text
from mxcore.transfer.layout import CHUNK_BYTES, Layout, Placement, build_layout
from mxcore.transfer.member import Membership

__all__ = ["Published", "chunk_bytes_of", "publish"]

_FEWEST_CHUNKS = 64  # so that several readers of a small model have something to give each other
_SMALLEST_CHUNK_BYTES = 64 * 1024


class Published:
    """Tensors that this process serves until `close`, the end of the `with` block, or of the process. Thread-safe.

    They must not be changed meanwhile: whoever fetches compares every byte with digests that were made at the start,
    and refuses what differs; and when this process itself finds a change, it serves them no more (`withdrawn`).
    """

    def __init__(self, member: Membership, name: str, version: str, withdrawn: Sequence[str] = ()) -> None:
        self.name = name
        self.version = version
        self._member = member
        self._withdrawn = withdrawn  # grows by a line when the member finds its memory changed
        # A child of multiprocessing runs no atexit functions, but these.
        self._at_exit = util.Finalize(None, member.close, exitpriority=100)

    @property
    def rank(self) -> int:
        """Which part of the whole these tensors are."""
        return self._member.worker_rank

    @property
    def uri(self) -> str:
        """What running engines call it: mx://NAME/VERSION, for their updates."""
        return published_uri(self.name, self.version)

    @property
    def worker_id(self) -> str:
        """This publication's name at the server: `mx sources` shows it."""
        return self._member.worker_id

    @property
    def endpoint(self) -> str | None:
        """host:port that readers call; None once it is closed."""
        return self._member.endpoint

    @property
    def withdrawn(self) -> str:
        """Why nobody is served any more although it was not closed: the tensors have changed. Else empty."""
        return self._withdrawn[0] if self._withdrawn else ""

    @property
    def total_bytes(self) -> int:
        """What a reader of everything fetches; 0 once it is closed."""
        holder = self._member.holder
        return holder.layout.total_bytes if holder is not None else 0

    @property
    def readers(self) -> int:
        """How many processes are fetching from this one now."""
        holder = self._member.holder
        return holder.live_leases if holder is not None else 0

    @property
    def bytes_given(self) -> int:
        """What readers of this process were given so far, all together; 0 once it is closed."""
        holder = self._member.holder
        return holder.bytes_granted if holder is not None else 0

    def close(self) -> None:
        """Takes no new readers, waits for those that read (at most MX_DRAIN_TIMEOUT_SECS), and withdraws the version.

        Then nobody reads the tensors any more, and they may be changed. Idempotent; never raises.
        """
        self._at_exit.cancel()
        self._member.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{self.total_bytes} bytes at {self.endpoint}" if self.endpoint else "closed"
        state = f"withdrawn, {self.withdrawn}" if self.withdrawn else state
        return f"<Published {self.name!r} version {self.version}, rank {self.rank}: {state}>"


def publish(
    name: str,
    tensors: Tensors,
    version: int | str,
    *,
    rank: int = 0,
    copy: bool = False,
    server: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Published:
    """Serves `tensors` to all who `fetch` this name and version, until the result is closed.

    `tensors` are torch or numpy tensors by name, or an nn.Module (its `state_dict`), all in host memory or all on CUDA
    devices, there also other arrays (`__cuda_array_interface__`: cupy, numba, jax); tied ones travel once. They are
    served where they are, and must not change until `close`; with `copy` a copy in host memory is served, and they may.
    Where a model is in parts, each process publishes its own under its `rank`. Several processes may publish equal
    bytes under one version; where the bytes differ, nobody is believed unless most agree
    (docs/explanation/threat-model.md).

    `server` is host:port or https://host:port, by default that of MODEL_EXPRESS_URL or MX_SERVER_ADDRESS; `settings`
    are others of docs/reference/settings.md, by name, before the environment's. Certificates and tokens are the
    environment's. Returns when the server knows of it. Call it after a fork, from any thread.

    Raises:
        SettingError: a name, a version or a setting that cannot be used; no server.
        LayoutUnsupported: tensors that cannot be moved, with their names.
        ServerUnreachable, ServerRefused: the server does not answer, or says no.
        NixlMissing, NixlError: device memory cannot be served.
    """
    identity = identity_of(name, version_text(version))
    chosen = settings_of(server, settings)
    given = by_name(tensors)
    synchronize(given)
    keep: object = given
    if copy:
        keep, layout, placement = _copied(given)
    else:
        layout, placement = build_layout("raw", described(given))
    member = Membership(chosen, identity, rank, placement.device_type, chunk_bytes=chunk_bytes_of(layout))
    withdrawn: list[str] = []
    member.on_bad_memory = withdrawn.append
    try:
        member.join(required=True)
        member.serve(layout, placement, {}, keep_alive=keep)
        if not member.published:
            member.join(required=True)
    except BaseException:
        member.close()
        raise
    return Published(member, name, identity.revision, withdrawn)


def chunk_bytes_of(layout: Layout) -> int:
    """How large the chunks of published tensors are: all who publish the same have the same."""
    size = CHUNK_BYTES
    while size > _SMALLEST_CHUNK_BYTES and size * _FEWEST_CHUNKS > layout.total_bytes:
        size //= 2
    return size


def _copied(given: Mapping[str, Any]) -> tuple[NewTensors, Layout, Placement]:
    """A copy in host memory, and how it lies there."""
    layout, placement = build_layout("raw", described(given))
    new = NewTensors(layout, framework_of(given))
    if placement.device_type == "cpu":
        for source, destination, size_bytes in zip(
            placement.addresses, new.placement.addresses, layout.extent_bytes, strict=True
        ):
            ctypes.memmove(destination, source, size_bytes)
    else:
        copy_extents_to_host(layout, placement, new.placement)
    return new, layout, new.placement
