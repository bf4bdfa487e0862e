"""The chunks that a worker receives: which are verified, which are missing, and the digests they must have."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeAlias

from mxcore.errors import DigestMismatch, LayoutMismatch, SourceRefused
from mxcore.transfer.layout import (
    DIGEST_BYTES,
    KINDS,
    XXH3,
    ChunkDigests,
    ChunkRequest,
    Chunks,
    Layout,
    Placement,
    Scalars,
    SwarmPlan,
    chunk_digests,
    chunk_set,
    chunks_of,
    digest_threads,
    scalars_digest,
    scalars_from_proto,
)
from mxcore.transfer.receive.content_claims import Content, ContentClaims
from mxcore.transfer.route import digester_of
from mxserver.wire.proto import mx_pb2

__all__ = ["ContentMismatch", "ProgressCallback", "ReceivedChunks"]

ProgressCallback: TypeAlias = Callable[[int, int], None]

_NAMED_DIFFERENCES = 5
_READ_THEMSELVES = (mx_pb2.DIGEST_ORIGIN_READ, mx_pb2.DIGEST_ORIGIN_PROCESSED)  # the others repeat whom they took from


class ContentMismatch(SourceRefused):
    """A holder has other bytes under the same identity and layout than those that are being received."""


class ReceivedChunks:
    """The state of one receive: the plan, and the memory that it fills. Thread-safe.

    `changed` guards the plan and is notified of every change. All chunks are of one content: that of the first holder
    that was admitted, until the `claims` of others decide for another one. In monotonic seconds: `news` is when there
    was last any progress, or when a full holder that has more than is here may be asked again; `first_asked_at` when
    the first chunk was granted, `done_at` when a chunk was last verified. `total_bytes` are those that are received: of
    all chunks, or of the set `only`.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        scalar_names: Sequence[str],
        progress: ProgressCallback | None,
        chunk_bytes: int,
        only: int | None = None,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.chunks = Chunks(layout, chunk_bytes)
        self.total_bytes = layout.total_bytes if only is None else sum(map(self.chunks.bytes_of, chunks_of(only)))
        self.addresses = self.chunks.local_addresses(placement)
        self._digester = digester_of(placement)
        self.changed = threading.Condition()
        self.content: Content | None = None
        self.claims = ContentClaims()
        self.bytes_from: dict[str, int] = {}
        self.bytes_again = 0  # of chunks that had to be asked for a second time
        self.news = time.monotonic()
        self._most_had: dict[str, int] = {}  # by holder: how many chunks it was heard to have
        self.first_asked_at: float | None = None
        self.done_at = self.news
        self._scalar_names = frozenset(scalar_names)
        self._progress = progress
        self._telling = threading.Lock()
        self._told = 0
        self._was_wrong: set[str] = set()  # holders of which a chunk was wrong
        self._bytes_done = 0
        self._plan = SwarmPlan(len(self.chunks), chunk_bytes, only)

    @property
    def finished(self) -> bool:
        """Whether every chunk is verified."""
        with self.changed:
            return self._plan.finished and self.content is not None

    @property
    def bytes_done(self) -> int:
        """Bytes of the chunks that are verified."""
        with self.changed:
            return self._bytes_done

    @property
    def verified(self) -> int:
        """The set of verified chunks."""
        with self.changed:
            return self._plan.completed

    @property
    def missing(self) -> list[int]:
        """The chunks that are not verified, ascending."""
        with self.changed:
            return list(chunks_of(self._lacking))

    @property
    def _lacking(self) -> int:
        return self._plan.everything & ~self._plan.completed

    def admit(
        self, holder: str, answer: mx_pb2.GetLayoutResponse, *, owner: str = "", known: ChunkDigests | None = None
    ) -> None:
        """Compares what a holder has with what is wanted here; the first holder's content becomes ours.

        `owner` is the name that the server knows the holder by, where it knows one; `known` are the digests that the
        holder was told of, which it need not send.

        Raises LayoutMismatch, SourceRefused, DigestMismatch, ContentMismatch.
        """
        where = f"worker {holder}"
        if answer.fingerprint != self.layout.fingerprint:
            raise LayoutMismatch(f"{where} has another layout: {self._differences(answer.layout)}")
        if answer.chunk_bytes != self.chunks.chunk_bytes or answer.digest_kind not in KINDS:
            raise SourceRefused(
                f"{where} has chunks of {answer.chunk_bytes} bytes with {answer.digest_kind!r} digests; "
                f"this worker needs {self.chunks.chunk_bytes} and one of {KINDS}"
            )
        digests = ChunkDigests(answer.digests, answer.digest_kind)
        if known is not None and answer.digests_are_known and answer.digest_kind == known.kind:
            digests = known
        if len(digests.values) != DIGEST_BYTES * len(self.chunks):
            raise SourceRefused(f"{where} has {len(digests.values)} bytes of digests for {len(self.chunks)} chunks")
        content = Content(digests, answer.scalars_digest, self._check_scalars(where, answer))
        with self.changed:
            if self.content is None:
                self.content = content
                self.changed.notify_all()
            elif digests.kind != self.content.digests.kind:
                raise SourceRefused(
                    f"{where} has {digests.kind} digests; whether its bytes are those of the holders before it, "
                    f"which have {self.content.digests.kind}, cannot be told"
                )
            made_here = answer.digest_origin in _READ_THEMSELVES
            self.claims.note(holder, content, made_here=made_here, owner=owner)
            if not self.content.same_as(content):
                raise ContentMismatch(
                    f"{where} has other bytes under the same identity and layout than the content that is received"
                )

    def start_anew(self, content: Content) -> None:
        """Continues with another content; chunks that differ are missing again. No holder may be at work."""
        with self.changed:
            if self.content is not None:
                self._reopen(self.content.differences(content))
            self.content = content
            self.news = time.monotonic()

    @property
    def disputed(self) -> int:
        """The set of chunks of which holders have different digests."""
        with self.changed:
            return self.claims.disputed_chunks() if self.claims.disputed else 0

    def leave_to_files(self) -> None:
        """Disputed chunks are missing again: whoever reads them from the files decides. No holder may be at work."""
        with self.changed:
            self._reopen(self.claims.disputed_chunks())

    def believe(self, digests: ChunkDigests) -> bool:
        """Whether each of these digests is one that a holder has; then they are the content's from now on."""
        content = self.content
        if content is None or digests.kind != content.digests.kind:
            return False
        with self.changed:
            found = replace(content, digests=digests)
            different = content.differences(found)
            if any(digests.of_chunk(chunk) not in self.claims.digests_of(chunk) for chunk in chunks_of(different)):
                return False
            self.content = found
            return True

    def join(self, holder: str, distance: int = 0) -> None:
        """Adds a holder that can be asked, at this distance; what it has is not known yet."""
        with self.changed:
            self._plan.add_holder(holder, 0, distance)

    def has(self, holder: str, have: int) -> None:
        """Records what a holder has now. News, where that is more than before or something that is missing here."""
        with self.changed:
            self._plan.add_holder(holder, have)
            if self._has_more(holder, have.bit_count()) or have & self._lacking:
                self.news = time.monotonic()

    def full(self, holder: str, had: int, *, until: float) -> None:
        """A holder with so many chunks takes no reader until then. It is waited for where it has more than before, or
        must have something that is missing here: else workers that lack the same would wait for each other for ever.
        """
        with self.changed:
            if self._has_more(holder, had) or had > len(self.chunks) - self._lacking.bit_count():
                self.news = max(self.news, until)

    def _has_more(self, holder: str, had: int) -> bool:
        """Whether a holder has more chunks than ever before; not where it is heard of for the first time."""
        before = self._most_had.get(holder, had)
        self._most_had[holder] = max(before, had)
        return had > before

    def wanted(self, holder: str) -> ChunkRequest:
        """What to ask a holder for."""
        with self.changed:
            return self._plan.wanted(holder, time.monotonic())

    def limit(self, holder: str) -> int:
        """How many chunks may be in flight at a holder."""
        with self.changed:
            return self._plan.limit(holder)

    def claim(self, holder: str, granted: Collection[int]) -> tuple[list[int], list[int]]:
        """Takes what a holder granted; returns what to fetch, and what is no longer needed."""
        with self.changed:
            now = time.monotonic()
            if self.first_asked_at is None and granted:
                self.first_asked_at = now
            return self._plan.claim(holder, granted, now)

    def verify(self, chunk: int, made: bytes | None = None) -> bool:
        """Whether the chunk's bytes have the expected digest; `made` is their XXH3-64 if it is known already."""
        if self.content is None:
            return False
        expected = self.content.digests
        if made and expected.kind == XXH3:
            return made == expected.of_chunk(chunk)
        addresses = self.chunks.slice_of(self.addresses, chunk)
        lengths = self.chunks.slice_of(self.chunks.lengths, chunk)
        made = self._digester.many(expected.kind, addresses, lengths, array("Q", [0, len(lengths)]))
        return made == expected.of_chunk(chunk)

    @property
    def hashed_on_arrival(self) -> bool:
        """Whether the expected digests are of the kind that is made while bytes arrive."""
        return self.content is not None and self.content.digests.kind == XXH3

    def digests_here(self, kind: str) -> ChunkDigests:
        """The digests of the bytes that are in memory now."""
        return chunk_digests(self._digester, self.chunks, self.addresses, kind=kind)

    def accept(self, holder: str, chunk: int) -> None:
        """Records a verified chunk."""
        with self.changed:
            self.news = self.done_at = time.monotonic()
            self._plan.done(holder, chunk, self.news)
            count = self.chunks.bytes_of(chunk)
            self._bytes_done += count
            self.bytes_from[holder] = self.bytes_from.get(holder, 0) + count
            done = self._bytes_done
            self.changed.notify_all()
        if self._progress is not None:
            with self._telling:
                if done > self._told:
                    self._told = done
                    self._progress(done, self.total_bytes)

    def refuse(self, holder: str, chunk: int) -> bool:
        """A chunk has wrong bytes: it is missing again. False when it is not the first one of this holder.

        A single one may be the link's fault, or a message that overtook bytes.
        """
        with self.changed:
            self._plan.give_back(holder, chunk)
            self.bytes_again += self.chunks.bytes_of(chunk)
            first = holder not in self._was_wrong
            self._was_wrong.add(holder)
            self.changed.notify_all()
            return first

    def drop(self, holder: str) -> None:
        """Removes a holder from which nothing can arrive any more: what it was asked for is missing again."""
        with self.changed:
            lost = self._plan.drop_holder(holder)
            self.bytes_again += sum(map(self.chunks.bytes_of, chunks_of(lost)))
            self.changed.notify_all()

    def can_do_without(self, holder: str) -> bool:
        """Whether other holders have the rest."""
        with self.changed:
            return self._plan.can_do_without(holder)

    def stragglers(self) -> list[str]:
        """Holders that delay completion."""
        with self.changed:
            return self._plan.stragglers(time.monotonic())

    def drips(self) -> bool:
        """Whether all holders together give too little to be of use."""
        with self.changed:
            return self._plan.drips(time.monotonic())

    def recheck(self) -> list[int]:
        """Verifies all verified chunks again, after a fence, by all cores; returns those that are wrong and so missing
        again.
        """
        if self.content is None:
            return []
        expected, chunks = self.content.digests, list(chunks_of(self.verified))
        addresses, lengths, starts = array("Q"), array("Q"), array("Q", [0])
        for chunk in chunks:
            addresses.extend(self.chunks.slice_of(self.addresses, chunk))
            lengths.extend(self.chunks.slice_of(self.chunks.lengths, chunk))
            starts.append(len(addresses))
        values = self._digester.many(expected.kind, addresses, lengths, starts, threads=digest_threads())
        made = ChunkDigests(values, expected.kind)
        wrong = [chunk for i, chunk in enumerate(chunks) if made.of_chunk(i) != expected.of_chunk(chunk)]
        with self.changed:
            self._reopen(chunk_set(wrong))
        return wrong

    def _reopen(self, chunks: int) -> None:
        """Those of these chunks that were verified are missing again."""
        again = chunks & self._plan.completed
        self._plan.reopen(again)
        self._bytes_done -= sum(map(self.chunks.bytes_of, chunks_of(again)))

    def adopt(self, chunks: int) -> None:
        """Marks missing chunks as verified that came from elsewhere and have the right digests."""
        with self.changed:
            self._plan.adopt(chunks)
            self._bytes_done += sum(map(self.chunks.bytes_of, chunks_of(chunks)))

    def _check_scalars(self, where: str, answer: mx_pb2.GetLayoutResponse) -> Scalars:
        scalars = scalars_from_proto(answer.scalars)
        if scalars.keys() != self._scalar_names:
            missing = sorted(self._scalar_names - scalars.keys())
            extra = sorted(scalars.keys() - self._scalar_names)
            raise LayoutMismatch(
                f"{where} has other scalars: without {missing[:_NAMED_DIFFERENCES]}, "
                f"with {extra[:_NAMED_DIFFERENCES]} that are unknown here"
            )
        if scalars_digest(scalars) != answer.scalars_digest:
            raise DigestMismatch(f"{where}: the scalars are not those that their digest promises")
        return scalars

    def _differences(self, message: mx_pb2.Layout) -> str:
        lines = self.layout.differences(Layout.from_proto(message))
        more = f" and {len(lines) - _NAMED_DIFFERENCES} more" if len(lines) > _NAMED_DIFFERENCES else ""
        return "; ".join(lines[:_NAMED_DIFFERENCES]) + more
