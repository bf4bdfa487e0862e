"""A swarm on a fake clock: the product's own plan (mxcore.transfer.layout.plan) between simulated links.

Each worker's link carries one rate each way. A holder sends to its readers in turn, a chunk each (connections share a
link evenly), but not to one whose way in is taken for longer than to another's. A chunk is passed on only when it is
there as a whole. What a worker has is known to its readers `news_seconds` later; a death `notice_seconds` later. Run
as a module it prints the table of docs/swarm.md.
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

SEED = "w0"


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

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

    @property
    def chunk_seconds(self) -> float:
        """How long a chunk occupies a link."""
        return self.chunk_bytes / self.bytes_per_second


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
    queues: dict[str, deque[int]] = field(default_factory=dict)  # what each reader was granted, in the order of turns
    sent: int = 0
    finished_at: float | None = None
    from_storage: bool = False
    news_pending: bool = False
    last_news: float = 0.0
    readers: set[str] = field(default_factory=set)
    holders: dict[str, float] = field(default_factory=dict)  # and when each last gave something
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
        self._order = count()
        self._events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        self.workers: dict[str, Worker] = {}
        self._add(SEED, all_chunks(setting.chunks))
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

    def _at(self, when: float, kind: str, *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, arguments))

    def _add(self, name: str, have: int) -> Worker:
        plan = SwarmPlan(self.setting.chunks, self.setting.chunk_bytes)
        worker = Worker(
            name, plan, GrantCounts(self.chance), have, arrived=[0] * self.setting.chunks, last_news=self.now
        )
        self.workers[name] = worker
        return worker

    def _join(self, name: str) -> None:
        if name in self.workers:
            return
        self._add(name, 0)
        self._look(name)

    def _look(self, name: str) -> None:
        """Does what the receiver's main loop does: drops idle holders, adds others, or gives up."""
        me, setting = self.workers[name], self.setting
        if not me.alive or me.finished_at is not None:
            return
        if self.now - me.last_news > setting.patience_seconds:
            me.from_storage = True
            self._finish(me)
            return
        others = [w for w in self.workers.values() if w.alive and w is not me and w.name not in me.holders]
        free = [w for w in others if len(w.readers) < setting.most_readers and (w.have or w.finished_at is None)]
        if len(me.holders) >= setting.holders_at_once and free:
            idle = min(me.holders, key=lambda holder: me.holders[holder])
            if self.now - me.holders[idle] > setting.idle_seconds and not me.plan.in_flight(idle):
                self._disconnect(me, idle)
        complete = all_chunks(setting.chunks)
        sample = self.chance.sample(free, min(len(free), 4 * setting.holders_at_once))
        for other in sorted(sample, key=lambda w: w.have != complete)[: setting.holders_at_once - len(me.holders)]:
            other.readers.add(name)
            self.most_readers_seen = max(self.most_readers_seen, len(other.readers))
            me.holders[other.name] = self.now
            me.plan.add_holder(other.name, other.have)
            self._ask(me, other)
        self._at(self.now + setting.look_seconds * self.chance.uniform(0.5, 1.5), "look", name)

    def _ask(self, me: Worker, holder: Worker) -> None:
        wanted = me.plan.wanted(holder.name, self.now)
        if not wanted.most or not holder.alive:
            return
        granted = holder.given.grant(wanted.chunks & holder.have, wanted.preferred, wanted.most)
        taken, declined = me.plan.claim(holder.name, granted, self.now)
        holder.given.take_back(declined)
        excess = me.plan.in_flight(holder.name).bit_count() - me.plan.limit(holder.name)
        self.most_in_flight_over_limit = max(self.most_in_flight_over_limit, excess)
        if taken:
            holder.queues.setdefault(me.name, deque()).extend(taken)
            if not holder.sending:
                self._send(holder.name)

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
        me.holders[holder_name] = me.last_news = self.now
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
                reader.plan.add_holder(name, me.have)
                self._ask(reader, me)

    def _finish(self, me: Worker) -> None:
        me.finished_at = self.now
        me.have = all_chunks(self.setting.chunks)
        for holder in list(me.holders):
            self._disconnect(me, holder)
        self._announce(me)

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
        for holder in list(worker.holders):
            self._disconnect(worker, holder)
        for reader in sorted(worker.readers):
            self._at(self.now + self.setting.notice_seconds, "notice", reader, name)

    def _notice(self, name: str, dead: str) -> None:
        me = self.workers[name]
        if dead in me.holders:
            self._disconnect(me, dead)
            for holder in sorted(me.holders):
                self._ask(me, self.workers[holder])


def table(counts: list[int], setting: Setting) -> list[tuple[int, float, float, float, float]]:
    """Rows: receivers, seconds, over one receiver's, what the seed sent in models, doubling's over one receiver's."""
    rows = []
    single = 0.0
    for receivers in counts:
        swarm = Swarm(Setting(**{**vars(setting), "receivers": receivers}), 1)
        seconds = swarm.run()
        single = single or seconds
        sent = swarm.workers[SEED].sent / setting.chunks
        rows.append((receivers, seconds, seconds / single, sent, float(ceil(log2(receivers + 1)))))
    return rows


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
def main(receivers: str, gigabytes: float, gigabits: float, chunk_mib: int) -> None:
    """Prints how long a fleet takes, as a table."""
    counts = [int(part) if part.strip().isdigit() else 0 for part in receivers.split(",")]
    if min(counts) < 1:
        raise click.BadParameter(f"{receivers!r} is no list of counts such as 1,8,64", param_hint="--receivers")
    chunk_bytes = chunk_mib << 20
    setting = Setting(0, ceil(gigabytes * 1e9 / chunk_bytes), chunk_bytes, gigabits * 1e9 / 8)
    click.echo("| receivers | seconds | over one | seed sent, models | doubling by finished copies, over one |")
    click.echo("|---|---|---|---|---|")
    for number, seconds, ratio, sent, doubling in table(counts, setting):
        click.echo(f"| {number} | {seconds:.2f} | {ratio:.2f} | {sent:.2f} | {doubling:.0f} |")


if __name__ == "__main__":
    main()
