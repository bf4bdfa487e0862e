"""A published version, whole in this process' memory: how a running engine takes what `publish` offers.

Chunks that are equal in the version that is held already are copied and not sent. What is held is given to others, from
the first chunk that arrives until `close`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import util
from typing import Any

from mxcore.errors import DigestMismatch, NoSource, SourceRefused, TransferError
from mxcore.exchange.tensors import NewTensors
from mxcore.exchange.versions import identity_of, named_by
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import DTYPES, Checkpoint, TensorInfo
from mxcore.transfer.layout import (
    DIGEST_BYTES,
    KINDS,
    ChunkDigests,
    Chunks,
    HostDigester,
    Layout,
    all_chunks,
    chunk_digests,
    chunk_set,
    chunks_of,
)
from mxcore.transfer.member import Directory, Membership, current_place
from mxcore.transfer.move import Source, SourceClient
from mxcore.transfer.receive import ProgressCallback, ReceiveReport
from mxcore.transfer.serve import Origin
from mxserver.wire import SettingError
from mxserver.wire.calls import ServerClient

__all__ = ["CHUNK_BYTES_OF_PUBLISHED", "HeldVersion", "PublishedVersion"]

CHUNK_BYTES_OF_PUBLISHED = range(64 * 1024, 64 * 1024 * 1024 + 1)
"""That a holder may have."""

_MOST_ASKED = 8
_CODES = {f"torch.{dtype.torch_name}": (code, dtype.bits // 8) for code, dtype in DTYPES.items() if dtype.torch_name}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Content:
    """What a version is: how its tensors lie, and the digests of their chunks."""

    layout: Layout
    chunk_bytes: int
    digests: ChunkDigests

    @cached_property
    def digest(self) -> str:
        """What tells these weights from all others."""
        parts = (self.layout.fingerprint.encode(), str(self.chunk_bytes).encode(), self.digests.summary)
        return f"published-{hashlib.sha256(b' '.join(parts)).hexdigest()[:32]}"

    @cached_property
    def chunks(self) -> Chunks:
        return Chunks(self.layout, self.chunk_bytes)


class HeldVersion:
    """A version's tensors in host memory, given to others until `close`. `bytes_received` is what had to come for it.

    Not thread-safe.
    """

    def __init__(self, content: _Content, memory: NewTensors, member: Membership, bytes_received: int) -> None:
        self.bytes_received = bytes_received
        self._content = content
        self._memory = memory
        self._member = member
        self._at_exit = util.Finalize(None, member.close, exitpriority=100)

    @property
    def digest(self) -> str:
        """What tells these weights from all others."""
        return self._content.digest

    @property
    def total_bytes(self) -> int:
        """Of all tensors; tied ones count once."""
        return self._content.layout.total_bytes

    @property
    def checkpoint(self) -> Checkpoint:
        """The tensors' names, types and shapes."""
        found = {}
        for info in self._content.layout.tensors:
            code, itemsize = _CODES[info.dtype]
            size_bytes = math.prod(info.shape) * itemsize
            found[info.name] = TensorInfo(info.name, code, tuple(info.shape), 0, info.offset_bytes, size_bytes)
        return Checkpoint([], found)

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Torch tensors in this memory, by name; they must not be changed."""
        for info in self._content.layout.tensors:
            if names is None or info.name in names:
                yield info.name, self._memory.tensor(info)

    def copy_equal(self, content: _Content, to: NewTensors) -> int:
        """Copies the chunks that another version has as they are here into its memory; the set of them, each verified:
        memory may have changed since."""
        mine = self._content
        is_comparable = (
            mine.layout.fingerprint == content.layout.fingerprint
            and mine.chunk_bytes == content.chunk_bytes
            and mine.digests.kind == content.digests.kind
        )
        if not is_comparable:
            return 0
        chunks, equal = content.chunks, 0
        sources, destinations = chunks.local_addresses(self._memory.placement), chunks.local_addresses(to.placement)
        for chunk in range(len(chunks)):
            if mine.digests.of_chunk(chunk) != content.digests.of_chunk(chunk):
                continue
            equal |= 1 << chunk
            parts = (chunks.slice_of(values, chunk) for values in (destinations, sources, chunks.lengths))
            for destination, source, length in zip(*parts, strict=True):
                ctypes.memmove(destination, source, length)
        found = chunk_digests(HostDigester(), chunks, destinations, kind=content.digests.kind) if equal else None
        return chunk_set(
            chunk
            for chunk in chunks_of(equal)
            if found is not None and found.of_chunk(chunk) == content.digests.of_chunk(chunk)
        )

    def close(self) -> None:
        """Takes no new readers and waits for those that read; then the memory can go. Idempotent."""
        self._at_exit.cancel()
        self._member.close()


class PublishedVersion:
    """What is published under a name and a version (rank 0), as it is at the first look. Not thread-safe."""

    def __init__(self, name: str, version: str, settings: WorkerSettings) -> None:
        """Raises SettingError where no server is set."""
        if settings.server_address is None:
            raise SettingError(
                f"version {version} of {name!r} is published at a server: name it by MODEL_EXPRESS_URL or "
                "MX_SERVER_ADDRESS"
            )
        self.name = name
        self.version = version
        self._settings = settings.model_copy(update={"worker_grpc_port": 0})  # the engine's own offer has that port
        self._identity = identity_of(name, version)

    @classmethod
    def named(cls, uri: str, settings: WorkerSettings) -> PublishedVersion | None:
        """That of mx://NAME/VERSION; None for other URIs. Raises SettingError."""
        named = named_by(uri)
        return None if named is None else cls(*named, settings)

    @property
    def digest(self) -> str:
        """What tells its weights from all others. Raises NoSource, TransferError, WireError."""
        return self._content.digest

    def take(
        self,
        before: HeldVersion | None = None,
        progress: ProgressCallback | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> HeldVersion:
        """All of it, each byte verified, from all that have it; chunks that are equal in `before` are not sent.

        Ends early, by TransferStalled, once `stopped()`. Raises TransferError, WireError, HostMemoryError, NoSource.
        """
        content = self._content
        memory = NewTensors(content.layout, "torch")
        equal = before.copy_equal(content, memory) if before is not None else 0
        wanted = all_chunks(len(content.chunks)) & ~equal
        member = Membership(self._settings, self._identity, 0, "cpu", chunk_bytes=content.chunk_bytes)
        given: Mapping[str, int] = {}
        try:
            member.join(required=True)
            if wanted:
                report = self._receive(member, memory, wanted if equal else None, progress, stopped)
                if report.digests.summary != content.digests.summary:
                    raise DigestMismatch(
                        f"version {self.version} of {self.name!r} is not what those that have it said before: ask again"
                    )
                given = report.bytes_from
            origin = Origin.received(given)
            member.serve(content.layout, memory.placement, {}, content.digests, keep_alive=memory, origin=origin)
        except BaseException:
            member.close()
            raise
        received = sum(map(content.chunks.bytes_of, chunks_of(wanted)))
        logger.info(
            "version %s of %r: %d of %d bytes were sent, the others are as they were",
            *(self.version, self.name, received, content.layout.total_bytes),
        )
        return HeldVersion(content, memory, member, received)

    def _receive(
        self,
        member: Membership,
        memory: NewTensors,
        only: int | None,
        progress: ProgressCallback | None,
        stopped: Callable[[], bool],
    ) -> ReceiveReport:
        return member.receive(
            self._content.layout,
            memory.placement,
            {},
            member.find_sources(receiving=True),
            progress,
            relay_from=memory,
            only=only,
            keep_alive=memory,
            stopped=stopped,
        )

    @cached_property
    def _content(self) -> _Content:
        """What most of those say that have it. Raises DigestMismatch where no more than half agree."""
        settings = self._settings
        with ServerClient(str(settings.server_address), timeout_seconds=settings.server_timeout_seconds) as client:
            holders = Directory(client, "", 0, partial(current_place, settings)).holders(self._identity)
        failure: Exception = NoSource(f"nobody has version {self.version} of {self.name!r}: is it published?")
        found: list[_Content] = []
        for source in holders[:_MOST_ASKED]:
            try:
                found.append(_said(source, settings.stall_timeout_seconds))
            except TransferError as error:
                failure = error
        if not found:
            raise failure
        (digest, count), *_others = Counter(content.digest for content in found).most_common(1)
        if 2 * count <= len(found):
            raise DigestMismatch(
                f"those that have version {self.version} of {self.name!r} have different bytes, and no more than half "
                "of them agree: publish it again under another version"
            )
        return next(content for content in found if content.digest == digest)


def _said(source: Source, timeout_seconds: float) -> _Content:
    """What a holder says that it has. Raises TransferError."""
    with SourceClient(source, timeout_seconds=timeout_seconds) as client:
        answer = client.get_layout("")
    layout = Layout.from_proto(answer.layout)
    content = _Content(layout, answer.chunk_bytes, ChunkDigests(answer.digests, answer.digest_kind))
    if answer.chunk_bytes not in CHUNK_BYTES_OF_PUBLISHED or answer.digest_kind not in KINDS:
        raise SourceRefused(
            f"worker {source.worker_id} has chunks of {answer.chunk_bytes} bytes with {answer.digest_kind!r} digests"
        )
    if len(answer.digests) != DIGEST_BYTES * len(content.chunks):
        raise SourceRefused(f"worker {source.worker_id} has {len(answer.digests)} bytes of digests")
    return content
