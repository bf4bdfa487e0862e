"""A swarm on a fake clock: the product's own plan (mxcore.transfer.layout.plan) between simulated links.

Each worker's link carries one rate each way. A holder sends to its readers in turn, a chunk each (connections share a
link evenly), but not to one whose way in is taken for longer than to another's. A chunk is passed on only when it is
there as a whole. What a worker has is known to its readers `news_seconds` later; a death `notice_seconds` later.

The server and each holder answer calls one after the other, each of which takes its time (one core of Python). A
worker is told of a few holders once the server has heard of them, takes a lease of each, registers its memory, and only
then asks. A holder whose places are taken refuses, and says when to come back as the product does. A reader that dies
keeps its place until its lease is over. Run as a module it prints the table of docs/notes/swarm.md.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from math import ceil, log2
from typing import Any

import click

from mxcore.transfer.layout import GrantCounts, SwarmPlan, all_chunks
from mxcore.transfer.serve.refused_readers import LONGEST_SECONDS, SECONDS_A_READER, SHORTEST_SECONDS

SEED = "w0"
JOIN_CALLS = 3  # of a worker that starts at the server: its record, its stream, its record once it serves
READY_CALLS = 2
TOLD = 16  # holders of each kind, as Directory asks for


@dataclass(frozen=True)
class Setting:
    """What is simulated. What calls take was measured on the cores of a small machine."""

    receivers: int
    chunks: int
    chunk_bytes: int = 16 << 20
    bytes_per_second: float = 50e9
    holders_at_once: int = 8
    most_readers: int = 8
    news_seconds: float = 0.005
    notice_seconds: float = 0.1
    look_seconds: float = 0.1
    idle_seconds: float = 2.0
    patience_seconds: float = 8.0
    timeout_seconds: float = 600.0  # without a byte, whatever holders say: MX_TRANSFER_TIMEOUT
    server_call_seconds: float = 0.00043
    holder_call_seconds: float = 0.0003
    lease_seconds: float = 15.0
    register_seconds: float = 0.0  # of a receiver's memory, once for each holder; 0: over connections, without
    registrations: int = 2  # at once, where there are any

    @property
    def chunk_seconds(self) -> float:
        """How long a chunk occupies a link."""
        return self.chunk_bytes / self.bytes_per_second

    @property
    def most_holders(self) -> int:
        """How many a receiver has at once."""
        return min(self.holders_at_once, self.registrations) if self.register_seconds else self.holders_at_once


@dataclass
class Worker:
    """One worker; `arrived` counts how often each chunk came."""

    name: str
    plan: SwarmPlan
    given: GrantCounts
    have: int = 0
    alive: bool = True
    sending: bool = False
    in_free: float = 0.0
    calls_free: float = 0.0  # when its processor has answered all calls so far
    calls_seconds: float = 0.0
    known: bool = False  # to the server, as a holder
    queues: dict[str, deque[int]] = field(default_factory=dict)  # what each reader was granted, in the order of turns
    sent: int = 0
    finished_at: float | None = None
    from_storage: bool = False
    news_pending: bool = False
    last_news: float = 0.0
    last_byte: float = 0.0
    readers: set[str] = field(default_factory=set)
    refused: dict[str, float] = field(default_factory=dict)  # readers, and when they were
    holders: dict[str, float] = field(default_factory=dict)  # and when each last gave something
    opening: set[str] = field(default_factory=set)  # holders that were called and give nothing yet
    not_before: dict[str, float] = field(default_factory=dict)  # of holders that were full
    most_had: dict[str, int] = field(default_factory=dict)  # by holder that was full: chunks it was heard to have
    arrived: list[int] = field(default_factory=list)


class Swarm:
    """Runs until every living worker has everything. Deaths: (seconds, worker); joins: seconds of each receiver."""

    def __init__(
        self,
        setting: Setting,
        seed: int,
        *,
        joins: list[float] | None = None,
        deaths: list[tuple[float, int]] | None = None,
    ) -> None:
        self.setting = setting
        self.chance = random.Random(seed)
        self.now = 0.0
        self.most_in_flight_over_limit = 0
        self.most_readers_seen = 0
        self.refusals = 0
        self.server_calls = 0
        self.longest_server_wait = 0.0
        self._server_free = 0.0
        self._order = count()
        self._events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        self.workers: dict[str, Worker] = {}
        self._add(SEED, all_chunks(setting.chunks)).known = True
        self._complete, self._receiving = [SEED], list[str]()  # as the server lists them
        for number in range(setting.receivers):
            self._at(joins[number] if joins else 0.0, "join", f"w{number + 1}")
        for at, number in deaths or []:
            self._at(at, "die", f"w{number}")

    def run(self) -> float:
        """Seconds until the last living worker has everything."""
        while self._events:
            self.now, _, kind, arguments = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(*arguments)
        return max((w.finished_at for w in self.workers.values() if w.finished_at is not None), default=0.0)

    def holder_core_share(self) -> float:
        """The share of its time that the busiest holder's processor answered calls."""
        return max(worker.calls_seconds for worker in self.workers.values()) / self.now if self.now else 0.0

    def _at(self, when: float, kind: str, *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, arguments))

    def _add(self, name: str, have: int) -> Worker:
        plan = SwarmPlan(self.setting.chunks, self.setting.chunk_bytes)
        worker = Worker(
            name,
            plan,
            GrantCounts(self.chance),
            have,
            arrived=[0] * self.setting.chunks,
            last_news=self.now,
            last_byte=self.now,
        )
        self.workers[name] = worker
        return worker

    def _call_server(self, calls: int) -> float:
        """When the server has answered so many more calls."""
        self.server_calls += calls
        self._server_free = max(self.now, self._server_free) + calls * self.setting.server_call_seconds
        self.longest_server_wait = max(self.longest_server_wait, self._server_free - self.now)
        return self._server_free

    def _call(self, holder: Worker) -> float:
        """When the holder has answered one more call."""
        holder.calls_seconds += self.setting.holder_call_seconds
        holder.calls_free = max(self.now, holder.calls_free) + self.setting.holder_call_seconds
        return holder.calls_free

    def _join(self, name: str) -> None:
        if name in self.workers:
            return
        self._add(name, 0)
        at = self._call_server(JOIN_CALLS)
        self._at(at, "listed", name)
        self._at(at, "look", name)

    def _listed(self, name: str) -> None:
        """The server has heard of a worker, and tells others of it."""
        worker = self.workers[name]
        if worker.alive and not worker.known:
            worker.known = True
            (self._receiving if worker.finished_at is None else self._complete).append(name)
        elif worker.alive and worker.finished_at is not None and name in self._receiving:
            self._receiving.remove(name)
            self._complete.append(name)

    def _told(self, me: Worker) -> list[Worker]:
        """Holders that the server tells a worker of: some complete ones, then some that are receiving."""
        found = []
        for listed in (self._complete, self._receiving):
            some = self.chance.sample(listed, min(len(listed), TOLD))
            found += [self.workers[name] for name in some]
        return [w for w in found if w.alive and w is not me]

    def _look(self, name: str) -> None:
        """Does what the receiver's main loop does: drops idle holders, calls others, or gives up."""
        me, setting = self.workers[name], self.setting
        if not me.alive or me.finished_at is not None:
            return
        if self.now - me.last_news > setting.patience_seconds or self.now - me.last_byte > setting.timeout_seconds:
            me.from_storage = True
            self._finish(me)
            return
        others = [
            w
            for w in self._told(me)
            if w.name not in me.holders and w.name not in me.opening and me.not_before.get(w.name, 0.0) <= self.now
        ]
        if len(me.holders) >= setting.most_holders and others:
            idle = min(me.holders, key=lambda holder: me.holders[holder])
            if self.now - me.holders[idle] > setting.idle_seconds and not me.plan.in_flight(idle):
                self._disconnect(me, idle)
        for other in others[: max(0, setting.most_holders - len(me.holders) - len(me.opening))]:
            me.opening.add(other.name)
            self._at(self._call(other), "lease", name, other.name)
        self._at(self.now + setting.look_seconds * self.chance.uniform(0.5, 1.5), "look", name)

    def _lease(self, name: str, holder_name: str) -> None:
        """A holder answers a reader that asks for a lease."""
        me, holder, setting = self.workers[name], self.workers[holder_name], self.setting
        if not me.alive or not holder.alive or me.finished_at is not None:
            me.opening.discard(holder_name)
            return
        if len(holder.readers) >= setting.most_readers:
            me.opening.discard(holder_name)
            self.refusals += 1
            holder.refused = {r: at for r, at in holder.refused.items() if at > self.now - LONGEST_SECONDS}
            holder.refused[name] = self.now
            again = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, SECONDS_A_READER * len(holder.refused)))
            me.not_before[holder_name] = self.now + again * self.chance.uniform(0.75, 1.25)
            if self._is_worth_waiting_for(me, holder):
                me.last_news = max(me.last_news, me.not_before[holder_name])
            return
        holder.readers.add(name)
        self.most_readers_seen = max(self.most_readers_seen, len(holder.readers))
        self._at(self._call(holder) + setting.register_seconds, "open", name, holder_name)

    def _is_worth_waiting_for(self, me: Worker, holder: Worker) -> bool:
        """As ReceivedChunks.full has it: it has more than before, or must have something that is missing here."""
        had = holder.have.bit_count()
        before = me.most_had.get(holder.name, had)
        me.most_had[holder.name] = max(before, had)
        return had > before or had > me.have.bit_count()

    def _open(self, name: str, holder_name: str) -> None:
        """The reader has registered its memory, and asks for chunks."""
        me, holder = self.workers[name], self.workers[holder_name]
        me.opening.discard(holder_name)
        if not me.alive or me.finished_at is not None or not holder.alive:
            if me.alive:
                holder.readers.discard(name)
            return
        me.holders[holder_name] = self.now
        me.plan.add_holder(holder_name, holder.have)
        self._ask(me, holder)

    def _ask(self, me: Worker, holder: Worker) -> None:
        if holder.alive and me.plan.wanted(holder.name, self.now).most:
            self._at(self._call(holder), "grant", me.name, holder.name)

    def _grant(self, name: str, holder_name: str) -> None:
        me, holder = self.workers[name], self.workers[holder_name]
        if not me.alive or not holder.alive or holder_name not in me.holders or me.finished_at is not None:
            return
        wanted = me.plan.wanted(holder_name, self.now)
        if not wanted.most:
            return
        granted = holder.given.grant(wanted.chunks & holder.have, wanted.preferred, wanted.most)
        taken, declined = me.plan.claim(holder_name, granted, self.now)
        holder.given.take_back(declined)
        excess = me.plan.in_flight(holder_name).bit_count() - me.plan.limit(holder_name)
        self.most_in_flight_over_limit = max(self.most_in_flight_over_limit, excess)
        if taken:
            holder.queues.setdefault(name, deque()).extend(taken)
            if not holder.sending:
                self._send(holder_name)

    def _send(self, name: str) -> None:
        """The holder's link is free: the reader whose turn it is, of those that can take a chunk soonest."""
        holder = self.workers[name]
        holder.sending = False
        ready = [reader for reader, queue in holder.queues.items() if queue and self.workers[reader].alive]
        if not ready or not holder.alive:
            return
        spare = self.now + self.setting.chunk_seconds
        reader = min(ready, key=lambda reader: max(spare, self.workers[reader].in_free))
        queue = holder.queues.pop(reader)
        chunk = queue.popleft()
        holder.queues[reader] = queue  # its next turn comes after the others'
        me = self.workers[reader]
        me.in_free = max(self.now, me.in_free) + self.setting.chunk_seconds
        holder.sent += 1
        holder.sending = True
        self._at(self.now + self.setting.chunk_seconds, "send", name)
        self._at(me.in_free, "arrive", reader, name, chunk)

    def _arrive(self, name: str, holder_name: str, chunk: int) -> None:
        me, holder = self.workers[name], self.workers[holder_name]
        if not me.alive or not holder.alive or holder_name not in me.holders or me.finished_at is not None:
            return
        me.plan.done(holder_name, chunk, self.now)
        me.arrived[chunk] += 1
        me.have |= 1 << chunk
        me.holders[holder_name] = self.now
        me.last_news, me.last_byte = max(me.last_news, self.now), self.now
        self._announce(me)
        if me.plan.finished:
            self._finish(me)
        else:
            self._ask(me, holder)

    def _announce(self, me: Worker) -> None:
        if me.readers and not me.news_pending:
            me.news_pending = True
            self._at(self.now + self.setting.news_seconds, "news", me.name)

    def _news(self, name: str) -> None:
        me = self.workers[name]
        me.news_pending = False
        if me.alive:
            for reader in [self.workers[reader] for reader in sorted(me.readers)]:
                if reader.alive and name in reader.holders:
                    reader.plan.add_holder(name, me.have)
                    self._ask(reader, me)

    def _finish(self, me: Worker) -> None:
        me.finished_at = self.now
        me.have = all_chunks(self.setting.chunks)
        for holder in list(me.holders):
            self._disconnect(me, holder)
        self._announce(me)
        self._at(self._call_server(READY_CALLS), "listed", me.name)

    def _disconnect(self, me: Worker, holder: str) -> None:
        me.plan.drop_holder(holder)
        self.workers[holder].queues.pop(me.name, None)
        me.holders.pop(holder, None)
        self.workers[holder].readers.discard(me.name)

    def _die(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            return
        worker.alive = False
        for listed in (self._complete, self._receiving):
            if name in listed:
                listed.remove(name)
        for holder in list(worker.holders):
            self._disconnect(worker, holder)
            self.workers[holder].readers.add(name)  # as long as its lease says so
            self._at(self.now + self.setting.lease_seconds, "expire", holder, name)
        for holder in worker.opening:
            self._at(self.now + self.setting.lease_seconds, "expire", holder, name)
        for reader in sorted(worker.readers):
            self._at(self.now + self.setting.notice_seconds, "notice", reader, name)

    def _expire(self, holder: str, reader: str) -> None:
        self.workers[holder].readers.discard(reader)

    def _notice(self, name: str, dead: str) -> None:
        me = self.workers[name]
        if dead in me.holders:
            self._disconnect(me, dead)
            for holder in sorted(me.holders):
                self._ask(me, self.workers[holder])


@dataclass(frozen=True)
class Row:
    """What a fleet of so many receivers took: seconds, those over one receiver's, what the seed sent in models,
    doubling's seconds over one receiver's; refusals and calls to the server for each receiver, the longest that one
    waited for the server, and the share of its core that the busiest holder's calls took.
    """

    receivers: int
    seconds: float
    over_one: float
    seed_sent: float
    doubling: float
    refusals: float
    server_calls: float
    server_wait_seconds: float
    holder_core_share: float


def table(counts: list[int], setting: Setting) -> list[Row]:
    """A row for each number of receivers; the first is the one that others are compared with."""
    rows: list[Row] = []
    single = 0.0
    for receivers in counts:
        swarm = Swarm(Setting(**{**vars(setting), "receivers": receivers}), 1)
        seconds = swarm.run()
        single = single or seconds
        rows.append(
            Row(
                receivers,
                seconds,
                seconds / single,
                swarm.workers[SEED].sent / setting.chunks,
                float(ceil(log2(receivers + 1))),
                swarm.refusals / receivers,
                swarm.server_calls / receivers,
                swarm.longest_server_wait,
                swarm.holder_core_share(),
            )
        )
    return rows


HEADINGS = (
    "receivers",
    "seconds",
    "over one",
    "seed sent, models",
    "doubling by finished copies, over one",
    "refusals each",
    "calls to the server each",
    "longest wait for the server, s",
    "busiest holder's core",
)


@click.command()
@click.option("--receivers", default="1,8,64,256,1000", show_default=True)
@click.option(
    "--gigabytes",
    type=click.FloatRange(0, min_open=True),
    default=64.0,
    show_default=True,
    help="Of one worker's share of the model, 10^9 bytes.",
)
@click.option(
    "--gigabits",
    type=click.FloatRange(0, min_open=True),
    default=400.0,
    show_default=True,
    help="Rate of a link, each way.",
)
@click.option("--chunk-mib", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--register-seconds",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Registering the share once; 0: not needed.",
)
@click.option(
    "--registrations",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="How often it may be registered at once.",
)
def main(
    receivers: str, gigabytes: float, gigabits: float, chunk_mib: int, register_seconds: float, registrations: int
) -> None:
    """Prints how long a fleet takes, as a table."""
    counts = [int(part) if part.strip().isdigit() else 0 for part in receivers.split(",")]
    if min(counts) < 1:
        raise click.BadParameter(f"{receivers!r} is no list of counts such as 1,8,64", param_hint="--receivers")
    chunk_bytes = chunk_mib << 20
    setting = Setting(
        0,
        ceil(gigabytes * 1e9 / chunk_bytes),
        chunk_bytes,
        gigabits * 1e9 / 8,
        register_seconds=register_seconds,
        registrations=registrations,
    )
    click.echo("| " + " | ".join(HEADINGS) + " |")
    click.echo("|" + "---|" * len(HEADINGS))
    for row in table(counts, setting):
        click.echo(
            f"| {row.receivers} | {row.seconds:.2f} | {row.over_one:.2f} | {row.seed_sent:.2f} | {row.doubling:.0f} "
            f"| {row.refusals:.1f} | {row.server_calls:.1f} | {row.server_wait_seconds:.2f} "
            f"| {row.holder_core_share:.2f} |"
        )


if __name__ == "__main__":
    main()
