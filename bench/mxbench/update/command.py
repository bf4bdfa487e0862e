"""`mx bench update`: other weights for running vLLM engines: how long they pause for it, and what they answer.

Engines, an object store and a trainer have a network namespace each, with links that the kernel shapes (root). Each
engine is asked all the while. In a round all take another version out of the store by `mx rollout`, one after the
other; then one takes what the trainer publishes; then all take at once what it publishes next. `pause_over_transfer` is
the time without answers, the drain left out, of those that took weights from others, over that of a bare receive of the
same bytes over the same link; `t4_over_t1` the time until all have what the trainer publishes over that of one alone
(t4: of four engines); `storage_models_read` what came from the store for all engines, in models.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click

from mxbench.demo import far_storage
from mxbench.demo.processes import DemoError
from mxbench.demo.workers import PROMPTS
from mxbench.fleet.fleet import FleetError
from mxbench.results import document, json_option, rounds_option
from mxbench.update.clients import Client, PauseWatch, asking, roll_out, tokens_of, update_engine
from mxbench.update.fleet import Fleet, started

Answers = dict[str, list[int]]


@click.command("update")
@click.option("--engines", type=click.IntRange(2, 16), default=4, show_default=True, help="vLLM engines.")
@click.option(
    "--layers", type=click.IntRange(1), default=23, show_default=True, help="Of the model: 24 MB each; 23 are 537 MiB."
)
@click.option(
    "--megabits", type=click.FloatRange(1), default=320.0, show_default=True, help="Each link's rate, both ways."
)
@rounds_option(1, "Of three updates each.")
@json_option
def command(engines: int, layers: int, megabits: float, rounds: int, as_json: bool) -> None:
    """Other weights for running engines: pauses, fan-out, storage, answers."""
    if reason := far_storage.why_not():
        raise click.ClickException(reason)
    asked = {"engines": engines, "layers": layers, "megabits": megabits, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="mx-bench-") as place, ExitStack() as stack:
        try:
            fleet = started(stack, Path(place), engines, layers, megabits)
            measured = Measured(fleet)
            for number in range(rounds):
                measured.round(number)
        except (DemoError, FleetError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error
    figures = measured.figures()
    if as_json:
        more = {"seconds": measured.seconds, "failures": measured.failures[:20], "mixed": measured.mixed[:20]}
        click.echo(json.dumps(document("update", figures, settings=asked, samples=measured.samples, **more)))
        return
    for name, value in figures.items():
        click.echo(f"{name:24} {value:g}")
    for line in (*measured.failures[:20], *measured.mixed[:20]):
        click.echo(f"  {line}")


class Measured:
    """The rounds of one fleet. `samples` has each round's figures, `seconds` what they were made of."""

    def __init__(self, fleet: Fleet) -> None:
        self.samples: dict[str, list[float]] = {}
        self.seconds: list[dict[str, float]] = []
        self.failures: list[str] = []
        self.mixed: list[str] = []
        self.answers = 0
        self._fleet = fleet
        self._asked: list[tuple[Client, Sequence[Path]]] = []  # whose answers are looked at once versions are known
        self._known: dict[str, Answers] = {}
        self._published = 0
        self._learn(fleet.versions[0])

    def figures(self) -> dict[str, float]:
        """The medians of the rounds; what must not be, in all."""
        found = {name: round(median(values), 4) for name, values in self.samples.items()}
        wrong = {"mixed_answers": len(self.mixed), "failed_requests": len(self.failures), "answers": self.answers}
        return {**found, **wrong}

    def round(self, number: int) -> None:
        """Three updates; at its end all engines have what they began with."""
        fleet = self._fleet
        had, second, third = fleet.versions
        _say(f"round {number}: all engines take {second.name} from the store, one after the other")
        before = fleet.bytes_from_store()
        pauses = self._answered([had, second], fleet.urls, lambda: roll_out(fleet.urls, f"s3://models/{second.name}"))
        read = (fleet.bytes_from_store() - before) / fleet.model_bytes
        self._learn(second)
        uri = self._publish(third)
        _say("one engine takes what the trainer publishes")
        alone = self._answered([second, third], fleet.urls, lambda: self._update(fleet.urls[:1], uri))
        self._learn(third)
        bare = fleet.bare.ask(fetch=self._published)
        _say(f"{bare['bytes']} bytes in {bare['seconds']:.1f} s by {bare['transport']}, into bare memory")
        uri = self._publish(had)
        _say("all engines take at once what it publishes next")
        together = self._answered([second, third, had], fleet.urls, lambda: self._update(fleet.urls, uri))
        self._learn(had)
        taken = [pause.seconds for pause in (*pauses[1:], alone[0])]  # the first one of the rollout read the store
        t1, t_all = alone[0].seconds, max(p.ended for p in together) - min(p.began for p in together)
        if not all(taken) or not all(pause.seconds for pause in together):
            raise RuntimeError("an engine took weights without a pause that was seen")
        name = f"t{len(fleet.urls)}_over_t1"
        found = {
            "pause_over_transfer": median(taken) / bare["seconds"],
            name: t_all / t1,
            "storage_models_read": read,
        }
        for figure, value in found.items():
            self.samples.setdefault(figure, []).append(value)
        self.seconds.append(
            {
                "bare_transfer": bare["seconds"],
                "pause_from_store": pauses[0].seconds,
                "pause_from_peers": median(taken),
                "one": t1,
                "all": t_all,
            }
        )
        _say(json.dumps({"seconds": self.seconds[-1], "figures": found}))

    def _answered(self, versions: Sequence[Path], urls: list[str], update: Callable[[], object]) -> list[PauseWatch]:
        """Does an update while all engines are asked, and counts answers that are of none of the versions."""
        with ExitStack() as stack:
            watches = [stack.enter_context(PauseWatch(url)) for url in urls]
            with asking(urls) as clients:
                update()
        self._asked += [(client, versions) for client in clients]
        return watches

    def _learn(self, version: Path) -> None:
        """What the first engine answers with a version when nothing else is asked; then looks at the answers before."""
        if version.name not in self._known:
            url = self._fleet.urls[0]
            self._known[version.name] = {prompt: tokens_of(url, prompt) for prompt in PROMPTS}
        asked, self._asked = self._asked, []
        for client, versions in asked:
            if not all(each.name in self._known for each in versions):
                self._asked.append((client, versions))
                continue
            self.failures += client.failures
            self.answers += len(client.answers)
            for prompt, tokens in client.answers:
                if all(tokens != self._known[each.name][prompt] for each in versions):
                    self.mixed.append(f"{prompt!r}: {tokens}")

    def _publish(self, version: Path) -> str:
        self._published += 1
        return str(self._fleet.trainer.ask(publish=self._published, folder=str(version))["uri"])

    def _update(self, urls: list[str], uri: str) -> None:
        """At once. Raises RuntimeError unless all have it."""
        with ThreadPoolExecutor(len(urls)) as pool:
            list(pool.map(lambda url: update_engine(url, uri), urls))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command())
