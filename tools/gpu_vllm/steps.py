"""What is run, in this order: the most telling first. Each engine has a process of its own, and so has each bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mxbench.demo import models
from mxbench.demo.processes import files_away
from tests.vllm.engines import Loaded
from tools.gpu_vllm.engines import Engines
from tools.gpu_vllm.machine import Machine

ROOT = Path(__file__).parents[2]
LLAMA = {  # 126 MB: several chunks of 16 MiB, so that there is a middle in which to kill
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SLOW = "25MB"  # what a source that is killed, or whose receiver is, gives a second
QUANTISATION = "mx_hiding"  # tests.vllm.hiding: int8 by torch alone
REPORTED = (
    *("path", "layout", "transport", "operation", "bytes", "tensors", "seconds", "load_seconds", "steps", "serving"),
    *("chunks_verified", "bytes_from_storage", "fallbacks"),
)
SMALL_BENCH = ("--size-mib", "24", "--rounds", "1")
SMALL_FLEET = ("--tensors", "8", "--tensor-mib", "4", "--chunk-mib", "0.25", "--slow", "16MB")


@dataclass
class Run:
    """What steps share. `tiny` is carried, `large` made in the first step."""

    machine: Machine
    engines: Engines
    folder: Path
    tiny: Path
    large: Path
    answers: list[Any] = field(default_factory=list)  # of vLLM's default loader, of the large model


class Outcome(NamedTuple):
    """What a step found, and what of it is not as it should be."""

    found: dict[str, Any]
    wrong: list[str]


def outcome(found: dict[str, Any], **expected: bool) -> Outcome:
    return Outcome(found, [name for name, right in expected.items() if not right])


def _told(run: Run, name: str, loaded: Loaded) -> dict[str, Any]:
    report = {key: loaded.report[key] for key in REPORTED if key in loaded.report}
    return {**report, "default_steps": loaded.default_steps, "peak_bytes": run.engines.ask(name, "memory")}


def prepare(run: Run) -> Outcome:
    """Facts of the machine, and the model; the engines' processes begin to import."""
    run.engines.warm("default", "a", "b")
    models.generate(run.large, "llama", LLAMA)
    size = sum(file.stat().st_size for file in models.weight_files(run.large))
    return outcome({**run.machine.facts(), "model_bytes": size})


def default(run: Run) -> Outcome:
    """vLLM's default loader."""
    with run.machine.watched() as memory:
        loaded = run.engines.load("default", run.large, "auto")
        found = _told(run, "default", loaded)
    run.answers = loaded.answers
    tokens = [answer[0] for answer in loaded.answers]
    return outcome(
        {**found, "tokens": tokens, "device": memory.found()},
        several_answers=len({tuple(row) for row in tokens}) > 1,
    )


def first(run: Run) -> Outcome:
    """A by storage, on a GPU through the pinned ring."""
    with run.machine.watched() as memory:
        loaded = run.engines.load("a", run.large)
        found = {**_told(run, "a", loaded), "device": memory.found()}
    return outcome(
        found,
        equal=loaded.answers == run.answers,
        from_storage=found["path"] == "storage",
        serving=bool(found["serving"]),
        processed=found["layout"] == "processed",
        by_the_ring=not run.machine.gpu or bool(found["peak_bytes"]["ringed"]),
    )


def second(run: Run) -> Outcome:
    """B from A, while the weight files are away."""
    with run.machine.watched() as memory, files_away(models.weight_files(run.large)):
        loaded = run.engines.load("b", run.large)
        found = {**_told(run, "b", loaded), "device": memory.found()}
    return outcome(
        found,
        equal=loaded.answers == run.answers,
        from_a_worker=found["path"] == "p2p",
        transport=found["transport"] == run.machine.transport,
        processed=found["layout"] == "processed",
    )


def kill_receiver(run: Run) -> Outcome:
    """B is killed in the middle; A lives, and gives the next one the right bytes."""
    run.engines.warm("slow-a", "killed-b", "next-b")
    slow = {"source_rate_limit": SLOW}
    run.engines.load("slow-a", run.large, extra=slow)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(run.engines.load, "killed-b", run.large)
        middle = run.engines.wait_until_receiving(lambda: not lost.done())
        run.engines.kill("killed-b")
        killed = lost.exception() is not None
    run.engines.warm("last-b")
    with files_away(models.weight_files(run.large)):
        loaded = run.engines.load("next-b", run.large)
    found = {"middle": middle, **_told(run, "next-b", loaded)}
    run.engines.ask("next-b", "leave")  # who serves is A alone, for the next step
    return outcome(found, killed=killed, equal=loaded.answers == run.answers, from_a_worker=found["path"] == "p2p")


def kill_source(run: Run) -> Outcome:
    """A is killed in the middle; B takes the rest from storage."""
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(run.engines.load, "last-b", run.large)
        middle = run.engines.wait_until_receiving(lambda: not going.done())
        run.engines.kill("slow-a")
        loaded = going.result()
    found = {"middle": middle, **_told(run, "last-b", loaded)}
    return outcome(found, equal=loaded.answers == run.answers, said=bool(found["fallbacks"]))


def quantised(run: Run) -> Outcome:
    """int8 by the tests' own method: processed weights in every place that can hold them."""
    run.engines.warm("int8-a", "int8-b")
    for name in ("int8-a", "int8-b"):
        run.engines.ask(name, "hiding", wider=False)
    expected = run.engines.load("int8-a", run.tiny, "auto", quantization=QUANTISATION).answers
    source = run.engines.load("int8-a", run.tiny, quantization=QUANTISATION)
    with files_away(models.weight_files(run.tiny)):
        loaded = run.engines.load("int8-b", run.tiny, quantization=QUANTISATION)
    found = _told(run, "int8-b", loaded)
    return outcome(
        found,
        equal=expected == source.answers == loaded.answers,
        from_a_worker=found["path"] == "p2p",
        processed=found["layout"] == "processed",
    )


def _bench(run: Run, module: str, small: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Its JSON. Raises ValueError with what it said last, TimeoutExpired."""
    command = [sys.executable, "-m", module, "--json"]
    if run.machine.stand_in is not None:
        command += [*small, "--stand-in", str(run.machine.stand_in)]
    folders = [str(run.machine.peers)] if run.machine.peers else []
    folders += filter(None, [os.environ.get("PYTHONPATH")])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environ)
    try:
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise ValueError(f"{module} ended with {ran.returncode}: {ran.stderr[-2000:]}") from None
    return found


def fleet(run: Run) -> Outcome:
    """Workers without an engine, kills in both roles."""
    found = _bench(run, "mxbench.gpu.fleet", SMALL_FLEET, STEPS["fleet"].most_seconds)
    return outcome(found, right=all(scene["right"] for scene in found["found"].values()))


def bench(run: Run) -> Outcome:
    """`mx bench gpu`, other loaders beside it."""
    found = _bench(run, "mxbench.gpu.command", SMALL_BENCH, STEPS["bench"].most_seconds)
    return outcome(found, ran=bool(found["figures"] or found.get("ran")))


class Step(NamedTuple):
    """`least_seconds`: with less left it is not begun; after `most_seconds` its engines are killed. `needs` is a step
    that must have come to an end; `ends` are engines that nothing after it asks."""

    run: Callable[[Run], Outcome]
    least_seconds: float
    most_seconds: float
    needs: str = ""
    ends: tuple[str, ...] = ()


STEPS = {
    "prepare": Step(prepare, 30, 120),
    "default": Step(default, 40, 180, "prepare", ("default",)),
    "a": Step(first, 20, 120, "default"),
    "b": Step(second, 20, 120, "a", ("a", "b")),
    "kill_receiver": Step(kill_receiver, 45, 150, "b", ("killed-b", "next-b")),
    "kill_source": Step(kill_source, 15, 90, "kill_receiver", ("slow-a", "last-b")),
    "quantised": Step(quantised, 30, 120, "b", ("int8-a", "int8-b")),
    "fleet": Step(fleet, 40, 120),
    "bench": Step(bench, 60, 240),
}
