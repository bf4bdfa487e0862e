"""The faults of a fleet during a transfer: each one strikes, and says which processes must survive."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mxbench.chaos.tally import STALLED
from mxbench.fleet.fleet import Fleet, Process


@dataclass(frozen=True)
class Scene:
    """A fleet during a run, with the processes that the fault concerns. `all`: every worker."""

    fleet: Fleet
    chance: random.Random
    source: Process
    target: Process
    all: frozenset[Process]

    def for_a_moment(self, most_seconds: float, end: Callable[[], object]) -> threading.Timer:
        """Ends a fault after a random time; join it."""
        timer = threading.Timer(self.chance.uniform(0.05, most_seconds), end)
        timer.start()
        return timer


@dataclass(frozen=True)
class Struck:
    """`lost`: processes that the fault ended, or that stay unreachable in this run. `end` undoes what can be undone."""

    lost: frozenset[Process] = frozenset()
    source_is_gone: bool = False
    end: Callable[[], object] = lambda: None


Fault = Callable[[Scene], Struck]

_LONGEST_STOP_SECONDS = 7.0  # longer than the stall time-out: some come back after they were dropped


def _kill_target_of_stalled_source(scene: Scene) -> Struck:
    scene.source.signal(signal.SIGSTOP)
    time.sleep(scene.chance.uniform(0.02, 0.3))
    scene.target.signal(signal.SIGKILL)
    scene.target.popen.wait()
    time.sleep(scene.chance.uniform(0.0, 0.3))
    scene.source.signal(signal.SIGCONT)
    return Struck(frozenset([scene.target]))


def _signalled(number: signal.Signals, *, source: bool = False, target: bool = False) -> Fault:
    def fault(scene: Scene) -> Struck:
        hit = [process for process, meant in ((scene.source, source), (scene.target, target)) if meant]
        for process in hit:
            process.signal(number)
        return Struck(frozenset(hit), source_is_gone=source)

    return fault


def _stopped_for_a_moment(*, source: bool) -> Fault:
    def fault(scene: Scene) -> Struck:
        process = scene.source if source else scene.target
        process.signal(signal.SIGSTOP)
        return Struck(end=scene.for_a_moment(_LONGEST_STOP_SECONDS, lambda: process.signal(signal.SIGCONT)).join)

    return fault


def _cut_off(*, source: bool, for_good: bool) -> Fault:
    def fault(scene: Scene) -> Struck:
        process = scene.source if source else scene.target
        scene.fleet.link(process, up=False)

        def restore() -> None:
            scene.fleet.link(process, up=True)

        if for_good:  # for this run: it goes on living, and serves again in the next one
            return Struck(source_is_gone=source, end=restore)
        return Struck(end=scene.for_a_moment(_LONGEST_STOP_SECONDS, restore).join)

    return fault


def _kill_server(scene: Scene) -> Struck:
    scene.fleet.kill_server()
    return Struck(end=scene.fleet.start_server)


def _restart_server(scene: Scene) -> Struck:
    _kill_server(scene)
    scene.fleet.start_server()
    return Struck()


def _flip(scene: Scene) -> Struck:
    """Flips one bit of the source's memory after its digests were made; the source goes on serving it."""
    scene.source.send(f"flip {scene.chance.randrange(1 << 62)}")
    scene.source.expect("flipped")
    return Struck(frozenset([scene.source]))


FAULTS: dict[str, Fault] = {
    STALLED: _kill_target_of_stalled_source,
    "kill a source": _signalled(signal.SIGKILL, source=True),
    "stop a source": _signalled(signal.SIGSTOP, source=True),
    "kill a target": _signalled(signal.SIGKILL, target=True),
    "stop a target": _signalled(signal.SIGSTOP, target=True),
    "kill a source and a target": _signalled(signal.SIGKILL, source=True, target=True),
    "stop a source for a moment": _stopped_for_a_moment(source=True),
    "stop a target for a moment": _stopped_for_a_moment(source=False),
    "flip a bit at a source": _flip,
    "kill the server": _kill_server,
    "restart the server": _restart_server,
}

CUTS: dict[str, Fault] = {  # these need a network of namespaces
    "cut off a source": _cut_off(source=True, for_good=True),
    "cut off a source for a moment": _cut_off(source=True, for_good=False),
    "cut off a target for a moment": _cut_off(source=False, for_good=False),
}
