"""Receives all chunks of a layout from many holders at once into this process' memory, and verifies each one.

Nothing may be used before `receive` has returned: then every chunk has the digest that its holders agree on, or that
those say who are believed (`claims`), and every abandoned transfer is fenced.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

from mxcore.errors import (
    ChunksMissing,
    DigestMismatch,
    FenceFailed,
    SourceBusy,
    SourceSlow,
    SourceUnreachable,
    TransferError,
    TransferStalled,
)
from mxcore.settings import WorkerSettings
from mxcore.transfer.layout import CHUNK_BYTES, Layout, Placement
from mxcore.transfer.move import RegisteredSessions, SessionAhead, Source, SourceClient
from mxcore.transfer.receive.content_claims import Content
from mxcore.transfer.receive.holder_pull import END_SECONDS, HolderPull, call_deadline_seconds
from mxcore.transfer.receive.holder_search import FindMore, HolderSearch
from mxcore.transfer.receive.load_progress import LoadStep, Progress, peer_path
from mxcore.transfer.receive.pace import MEGABYTE, Pace
from mxcore.transfer.receive.partial import PartialReceive
from mxcore.transfer.receive.receive_report import ReceiveReport
from mxcore.transfer.receive.received_chunks import ProgressCallback, ReceivedChunks
from mxcore.transfer.receive.tried_holders import TriedHolders
from mxcore.transfer.route import Route, UcxPolicy, require_movable
from mxserver.wire.proto import mx_pb2

__all__ = ["FindMore", "ReceiveReport", "Receiver", "Relay", "never_freed"]

logger = logging.getLogger(__name__)

TellDoubt: TypeAlias = Callable[[mx_pb2.DoubtKind.ValueType, Collection[str], int, str], None]
"""Takes whose bytes are doubted and why: the kind, holders, number of chunks, a text. Does not wait."""

never_freed: list[object] = []
"""Memory that somebody may still write to (FenceFailed)."""

_HOLDERS_AT_ONCE = 8
_POLL_SECONDS = 0.1  # between two checks of which holders ended, are slow, or are new
_IDLE_SECONDS = 2.0  # a holder that gave nothing for so long makes room for another
_PATIENCE_STALLS = 2  # stall time-outs without any progress, then the rest is missing
_NAMED_CHUNKS = 8
_LOAD_SPREAD = 4.0  # random readers added to a holder's load, so that not all receivers choose the same one


class Relay(Protocol):
    """Serves verified chunks while the others still come. Called from one thread at a time."""

    def begin(self, content: Content) -> None:
        """The content is known now; called again when the receive begins again with another one."""

    def update(self, verified: int) -> None:
        """The set of chunks that are verified."""


class Receiver:
    """One attempt of one worker to fill its memory; use it once, from one thread.

    `scalar_names` must be exactly the holders'. `progress` is called with (bytes verified, bytes in all), on any
    thread. `relay` may serve verified chunks while the others come. With `files_decide` the caller reads the missing
    chunks of a `partial` from the files: those of which holders have different bytes are among them. `only`: the set of
    chunks that are received; the extents that none of these touches need no memory, and nothing is left as a `partial`.
    `keep_alive` keeps the memory. What other holders there are may be known `lag_seconds` late. `tell_doubt` hears of
    holders that differ, and of those that gave wrong chunks. It ends early, by TransferStalled, once `stopped()`.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        settings: WorkerSettings,
        worker_id: str,
        scalar_names: Sequence[str] = (),
        progress: ProgressCallback | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        relay: Relay | None = None,
        files_decide: bool = False,
        keep_alive: object = None,
        tell_doubt: TellDoubt = lambda kind, holders, chunks, text: None,
        only: int | None = None,
        lag_seconds: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        require_movable(placement)
        self._settings, self._stopped = settings, stopped
        self._lag_seconds, self._tell_doubt = lag_seconds, tell_doubt
        self._keep_alive = keep_alive
        self._relay = relay
        self._relay_turn = threading.Lock()  # around all calls of the relay
        self._files_decide = files_decide
        self._only = only
        self._received = ReceivedChunks(
            layout, placement, scalar_names=scalar_names, progress=progress, chunk_bytes=chunk_bytes, only=only
        )
        if only is not None:
            layout, placement = self._received.chunks.touched(layout, placement, only)
        policy = UcxPolicy.from_environment(settings.transport, tcp_transfer=settings.tcp_transfer)
        on_device = placement.device_type != "cpu"
        likely = policy.likely_tls(same_host=settings.shares_only_this_host, device_memory=on_device)
        ahead = SessionAhead(
            settings,
            worker_id,
            likely,
            progress_thread=False,  # it has something to do only while a holder gives
            prepare=lambda session: session.register(layout, placement),
        )
        self._sessions = RegisteredSessions(ahead)
        self._chance = random.Random(worker_id)  # noqa: S311 - no secret
        self._pulls: dict[str, HolderPull] = {}
        self._candidates: dict[str, Source] = {}
        self._tried = TriedHolders(self._chance)
        self._clients: dict[str, SourceClient] = {}  # by endpoint, of holders that were full: their connections stay
        self._failures: list[TransferError] = []
        self._routes: dict[str, Route] = {}
        self._clean, self._in_clear, self._may_find = True, False, False
        self._listed_at = 0.0  # when the server was last asked, of the questions that it answered
        self._began = 0.0
        self._over = threading.Event()
        self._search = HolderSearch(self._others_found, self._chance)
        self._pace = Pace()

    def receive(
        self, sources: Sequence[Source], find_more: FindMore | None = None, step: LoadStep | None = None
    ) -> ReceiveReport:
        """Fetches from all `sources` at once, and from what `find_more` finds meanwhile, until all is verified.

        A holder that fails, stalls, leaves or sends wrong bytes costs what it had in flight; the others go on. `step`
        reports the progress. `find_more` may raise WireError.

        Raises:
            ChunksMissing: no holder is left to give the rest. Outside of the verified chunks the memory then holds
                anything; nothing arrives in it any more.
            TransferError: what the only holder said, when nothing at all came from it.
            FenceFailed: the memory may still be written to, for ever. It must not be used; `keep_alive` is never freed.
        """
        try:
            return self._receive(sources, find_more, step)
        except FenceFailed:
            never_freed.append(self._keep_alive)
            raise

    def _receive(self, sources: Sequence[Source], find_more: FindMore | None, step: LoadStep | None) -> ReceiveReport:
        started = self._began = time.monotonic()
        if step is not None:
            step.progress = self.progress
        self._may_find = find_more is not None
        self._sessions.start()  # while the first holders are asked what they have
        self._add(sources)
        background = [threading.Thread(target=self._relaying, name="mx-relay", daemon=True)] if self._relay else []
        if find_more is not None:
            self._search.start(find_more)
        for thread in background:
            thread.start()
        try:
            self._run(started + self._settings.transfer_timeout_seconds)
        finally:
            try:
                self._end_all(TransferStalled("the transfer was given up on"))
                for pull in self._pulls.values():
                    if isinstance(pull.failure, FenceFailed):
                        raise pull.failure
            finally:
                self._over.set()
                with self._received.changed:
                    self._received.changed.notify_all()
                self._search.stop()
                for thread in background:
                    thread.join()
                for client in [*self._clients.values(), *(pull.kept_client for pull in self._pulls.values())]:
                    if client is not None:
                        client.close()
                self._sessions.drop()
        report = self._report(time.monotonic() - started)
        if step is not None:
            report.tell(step)
        return report

    def look(self) -> None:
        """Something is new of who has weights: `find_more` is asked soon. From any thread, at any time."""
        self._search.look()

    def progress(self) -> Progress:
        """How far it is and which holder gave most; from any thread, while `receive` runs or after."""
        with self._received.changed:
            done, given = self._received.bytes_done, dict(self._received.bytes_from)
        pulls = dict(self._pulls)
        most = max(given or pulls, key=lambda name: given.get(name, 0), default="")
        route = pulls[most].route if most in pulls else self._routes.get(most)
        path = peer_path(route.transport if route is not None else "")
        return Progress(path, done, self._received.total_bytes, most, len(pulls), given)

    def _run(self, deadline: float) -> None:
        """Runs until everything is verified and fenced. Raises what `receive` raises, with holders still at work."""
        while True:
            self._collect_ended()
            if self._received.finished and self._all_heard():
                self._end_all(None)
                self._collect_ended()
                wrong = [] if self._clean else self._received.recheck()
                if not wrong:
                    if self._decide():
                        return
                    continue
                logger.warning("chunks %s were overwritten after they were verified; they are fetched again", wrong)
                self._clean = True
            if self._stopped():
                raise TransferStalled("nobody waits for these weights any more: the transfer was ended")
            now = time.monotonic()
            rate = self._pace.bytes_per_second(now, self._received.bytes_done)
            if now > deadline and rate < MEGABYTE:
                raise self._too_long()
            if not self._received.finished:  # else the first answers of some holders are awaited
                self._start(now)
                self._drop_stragglers()
                self._make_room(now)
                by_another_way = any(pull.may_be_unreachable for pull in self._pulls.values())
                if self._received.drips() and not by_another_way and self._decide():
                    self._failures.append(SourceSlow(f"{', '.join(self._pulls)}: less than 1 MB/s from all holders"))
                    raise self._failed()
                if self._nobody_left(now) and self._decide():
                    silent = f"nothing came for {_PATIENCE_STALLS} stall time-outs"
                    self._failures += [TransferStalled(f"worker {name}: {silent}") for name in self._pulls]
                    raise self._failed()
            with self._received.changed:
                if not (self._received.finished and self._all_heard()):
                    self._received.changed.wait(_POLL_SECONDS)

    def _too_long(self) -> TransferError:
        """What ends a transfer whose time is over, and of which little comes: what came is kept."""
        late = TransferStalled(
            f"the transfer took longer than {self._settings.transfer_timeout_seconds:g} s (MX_TRANSFER_TIMEOUT), and "
            "less than 1 MB/s comes"
        )
        self._failures.append(late)
        return self._failed() if self._received.verified and self._decide() else late

    def _add(self, sources: Sequence[Source]) -> None:
        with self._received.changed:
            for source in sources:
                self._candidates[source.worker_id] = source
            self._received.changed.notify_all()

    def _startable(self, now: float) -> list[Source]:
        """Holders that could be asked: near ones first, of these complete ones, then by load with some randomness.

        But for a complete one that is far: without any, those that are near might have nothing to give.
        """
        with self._received.changed:
            candidates = list(self._candidates.values())
        found = [
            source
            for source in candidates
            if source.worker_id not in self._pulls
            and self._tried.may_be_asked(source.worker_id, now)
            and self._sessions.may_take(source.worker_id)
        ]
        load = {source.worker_id: source.load + _LOAD_SPREAD * self._chance.random() for source in found}
        found.sort(key=lambda source: (source.distance, source.receiving, load[source.worker_id]))
        if all(pull.source.receiving for pull in self._pulls.values()):
            complete = next((source for source in found if not source.receiving), None)
            found.sort(key=lambda source: source is not complete)
        return found

    def _start(self, now: float) -> None:
        for source in self._startable(now)[: max(0, _HOLDERS_AT_ONCE - len(self._pulls))]:
            try:
                client = self._clients.pop(source.endpoint, None)
                pull = HolderPull(self._received, source, self._settings, self._sessions, client)
            except TransferError as error:  # its address or its certificate is of no use
                self._failed_holder(source, error, 0.0)
                continue
            self._pulls[source.worker_id] = pull
            self._tried.asked(source.worker_id)
            pull.start()

    def _make_room(self, now: float) -> None:
        """Stops a holder that gave nothing for long, when another one waits for its place or its session."""
        pulls = [pull for pull in self._pulls.values() if pull.route is not None and pull.route.by_nixl]
        if not (pulls and self._sessions.wanted):
            if len(self._pulls) < _HOLDERS_AT_ONCE or not self._startable(now):
                return
            pulls = list(self._pulls.values())
        idle = min(pulls, key=lambda pull: pull.busy_at)
        if now - idle.busy_at > _IDLE_SECONDS:
            idle.stop()

    def _drop_stragglers(self) -> None:
        for name in self._received.stragglers():
            if (pull := self._pulls.get(name)) is not None:
                pull.stop(SourceSlow(f"worker {name} is so slow that others give its chunks sooner"))

    def _collect_ended(self) -> None:
        now = time.monotonic()
        for name in [name for name, pull in self._pulls.items() if pull.ended]:
            pull = self._pulls.pop(name)
            pull.join()
            self._clean = self._clean and pull.clean
            self._in_clear |= pull.in_clear and name in self._received.bytes_from
            if pull.route is not None:
                self._routes[name] = pull.route
                self._tried.gave(name)
            if (client := pull.kept_client) is not None:
                self._clients[client.source.endpoint] = client
            if pull.failure is None:
                self._tried.ended(name, now)
            else:
                self._failed_holder(pull.source, pull.failure, now - pull.started_at)

    def _failed_holder(self, source: Source, error: TransferError, asked_seconds: float) -> None:
        """Records a holder's failure. Raises FenceFailed, when that is what it is."""
        if isinstance(error, FenceFailed):
            raise error
        if isinstance(error, SourceBusy):
            again_at = self._tried.full(source.worker_id, error, time.monotonic())
            had = error.had_chunks
            if had is None:  # it is of an older release
                had = 0 if source.receiving else len(self._received.chunks)
            self._received.full(source.worker_id, had, until=again_at)
            return
        logger.warning(
            "worker %s (%s), asked for %.1f s, gives no (more) weights: %s",
            source.worker_id,
            source.endpoint,
            asked_seconds,
            error,
        )
        self._failures.append(error)
        if isinstance(error, DigestMismatch):
            with self._received.changed:
                self._received.claims.discredit(source.worker_id)
            self._tell_doubt(mx_pb2.DOUBT_KIND_WRONG_CHUNKS, [source.worker_id], 1, str(error))
        self._tried.failed(source.worker_id, error, time.monotonic(), may_find=self._may_find)

    def _nobody_left(self, now: float) -> bool:
        """Whether nothing can come: all failed and no other is listed, or no progress for too long.

        Those that failed may come back unless that was for good, and others may come: for one more deadline.
        """
        tried = self._tried
        with self._received.changed:
            for_good = tried.all_failed_for_good(self._candidates)
            if for_good and not self._pulls and not self._may_find:
                return True
            if not self._pulls and self._candidates and self._listed_at > tried.failed_at:
                waited = now - tried.failed_at > call_deadline_seconds(self._settings)
                if for_good or (waited and tried.all_failed(self._candidates)):
                    return True
            return now - self._received.news > _PATIENCE_STALLS * self._settings.stall_timeout_seconds

    def _all_heard(self) -> bool:
        """Whether every holder that was asked has said which bytes it has, or failed."""
        return all(pull.heard or pull.ended for pull in self._pulls.values())

    def _decide(self) -> bool:
        """Whether the content that is received is the one to take. False: a receive of another one has begun.

        Raises ChunksMissing where holders have different bytes and nobody can be believed, or the files decide.
        """
        received = self._received
        with received.changed:
            claims, content = received.claims, received.content
            believed, said, numbers = claims.believed(), str(claims), claims.scalars_disputed
            disputed = claims.disputed
        if not disputed and believed is None:
            return True
        by_files = disputed and self._files_decide and not numbers
        if not by_files and believed is not None:
            if content is not None and believed.same_as(content):
                return True
            self._start_anew(believed)
            return False
        logger.error("holders have different bytes under one identity: %s", said)
        self._tell_dispute("the files decide" if by_files else "nobody is believed", said)
        self._end_all(TransferStalled("holders have different bytes"))
        self._collect_ended()
        received.leave_to_files()
        raise self._failed(f"holders have different bytes of these weights ({said})", by_files=by_files)

    def _start_anew(self, content: Content) -> None:
        """Holders have different bytes and others are believed: what differs is received from those."""
        logger.error("holders have different bytes under one identity, others are believed: %s", self._received.claims)
        self._tell_dispute("the majority of those that made digests is believed", str(self._received.claims))
        self._end_all(TransferStalled("it has other bytes than those that are taken now"))
        self._collect_ended()
        with self._relay_turn:
            if self._relay is not None:
                self._relay.update(0)  # before the memory is overwritten
            self._received.start_anew(content)
        self._tried.clear()
        self._failures.clear()

    def _tell_dispute(self, outcome: str, said: str) -> None:
        with self._received.changed:
            holders, chunks = self._received.claims.holders, self._received.disputed.bit_count()
        self._tell_doubt(mx_pb2.DOUBT_KIND_HOLDERS_DIFFER, holders, chunks, f"{outcome}: {said}")

    def _end_all(self, error: TransferError | None) -> None:
        for pull in self._pulls.values():
            pull.stop(error, at_once=True)
        deadline = time.monotonic() + END_SECONDS
        for pull in self._pulls.values():
            pull.join(deadline - time.monotonic())

    def _failed(self, why: str = "", *, by_files: bool = True) -> TransferError:
        """What `receive` raises; with `by_files`, what is missing may be completed from the files."""
        if not self._candidates and not self._failures:
            return SourceUnreachable("there is no worker to receive weights from")
        if not why and len(self._failures) == 1 and not self._received.verified:
            only = self._failures[0]
            if not isinstance(only, DigestMismatch | SourceSlow):  # of which bytes came
                return only
        missing = self._received.missing
        names = ", ".join(map(str, missing[:_NAMED_CHUNKS])) + (", ..." if len(missing) > _NAMED_CHUNKS else "")
        reasons = why or "; ".join(str(error) for error in self._failures) or "nobody had them"
        return ChunksMissing(
            f"{reasons}: {len(missing)} of {len(self._received.chunks)} chunks did not come ({names})",
            missing=missing,
            failures=self._failures,
            partial=self._partial() if self._received.verified and by_files and self._only is None else None,
        )

    def _partial(self) -> PartialReceive[ReceiveReport]:
        began = self._began

        def report(other_bytes: int) -> ReceiveReport:
            return replace(self._report(time.monotonic() - began), bytes_otherwise=other_bytes)

        return PartialReceive(self._received, report)

    def _relaying(self) -> None:
        """On a thread of its own: tells the relay which chunks are verified."""
        relay, received = self._relay, self._received
        if relay is None:
            return
        begun: Content | None = None
        while not self._over.is_set():
            with self._relay_turn:
                with received.changed:
                    content, verified = received.content, received.verified
                if content is not None and content is not begun:
                    relay.begin(content)
                    begun = content
                if content is not None:
                    relay.update(verified & ~received.disputed)
            with received.changed:
                if not self._over.is_set() and (received.content, received.verified) == (content, verified):
                    received.changed.wait(_POLL_SECONDS)

    def _others_found(self, found: Sequence[Source], asked_at: float) -> None:
        with self._received.changed:
            self._add(found)
            self._listed_at = asked_at - self._lag_seconds

    def _report(self, seconds: float) -> ReceiveReport:
        received = self._received
        content = received.content
        if content is None:
            raise SourceUnreachable("there is no worker to receive weights from")
        most = max(received.bytes_from or self._routes, key=lambda name: received.bytes_from.get(name, 0), default="")
        route = self._routes.get(most)
        moving_seconds = received.done_at - received.first_asked_at if received.first_asked_at is not None else 0.0
        return ReceiveReport(
            bytes=received.total_bytes,
            tensors=len(received.layout.tensors),
            chunks_verified=received.verified.bit_count(),
            seconds=seconds,
            source_worker_id=most,
            operation=route.operation if route else "read",
            transport=route.transport if route else "same-host",
            scalars=content.scalars,
            digests=content.digests,
            failures=tuple(str(error) for error in self._failures),
            bytes_from=dict(received.bytes_from),
            bytes_again=received.bytes_again,
            moving_seconds=moving_seconds,
            in_clear=self._in_clear,
        )
