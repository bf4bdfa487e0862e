"""`mx bench compare A B`: which figures changed from one run to another, and whether for the worse.

A and B are what a bench printed with --json, or folders of such files. A figure has changed when its median differs by
more than --threshold, and the rounds of both runs do not explain it: where each median lies within the other run's p10
to p90, it is called unclear. Whether more or less is better is told by the figure's unit.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from mxbench.results.arguments import json_option
from mxbench.results.files import Documents, read_documents
from mxbench.results.units import better, unit_of

Verdict = Literal["slower", "faster", "changed", "unclear", "no change"]
_SAME_MACHINE = ("kernel", "cpu", "cores", "gpus", "commit")
_WORDS = {"slower": "worse", "faster": "better", "changed": "changed", "unclear": "unclear, the rounds scatter"}


class Change(NamedTuple):
    """One figure of both runs: medians, and the second over the first."""

    name: str
    unit: str
    before: float
    after: float
    verdict: Verdict

    @property
    def percent(self) -> float:
        """By how much it changed; infinite where it was 0."""
        if self.before:
            return (self.after / self.before - 1) * 100
        return float("inf") if self.after else 0.0

    def line(self) -> str:
        """For people."""
        unit = "" if self.unit in ("ratio", "count") else f" {self.unit}"
        amount = f"{self.percent:+.0f} %" if self.before else "was 0"
        return f"{self.name}: {self.before:.4g} -> {self.after:.4g}{unit} ({amount}), {_WORDS[self.verdict]}"


def changes(before: Documents, after: Documents, threshold: float) -> list[Change]:
    """Every figure that both have, in the order of the first. `threshold`: 0.1 is 10 %."""
    return [
        _change(f"{document}: {name}" if document else name, name, spread, _spreads(after[document])[name], threshold)
        for document in before
        if document in after
        for name, spread in _spreads(before[document]).items()
        if name in after[document]["figures"]
    ]


def _spreads(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median, p10 and p90 of each figure; of a document without details all three are the figure."""
    told = document.get("details", {}).get("figures", {})
    return {
        name: {"median": value, "p10": value, "p90": value, **told.get(name, {})}
        for name, value in document["figures"].items()
    }


def _change(label: str, name: str, before: dict[str, float], after: dict[str, float], threshold: float) -> Change:
    old, new = before["median"], after["median"]
    made = Change(label, unit_of(name), old, new, "no change")
    if abs(new - old) <= threshold * abs(old):
        return made
    if before["p10"] <= new <= before["p90"] and after["p10"] <= old <= after["p90"]:
        return made._replace(verdict="unclear")
    wanted = better(name)
    if not wanted:
        return made._replace(verdict="changed")
    return made._replace(verdict="faster" if (new > old) == (wanted == "higher") else "slower")


def differences(before: Documents, after: Documents) -> Iterator[str]:
    """What else differs, so that figures may: machine, settings, figures that only one has."""
    for document in before:
        label = f"{document}: " if document else ""
        if document not in after:
            yield f"{label}only in the first"
            continue
        old, new = before[document], after[document]
        details = [each.get("details", {}) for each in (old, new)]
        machines = [each.get("machine", {}) for each in details]
        for name in _SAME_MACHINE:
            if machines[0].get(name) != machines[1].get(name):
                yield f"{label}{name} differs: {machines[0].get(name)!r} and {machines[1].get(name)!r}"
        if details[0].get("settings") != details[1].get("settings"):
            yield f"{label}the settings differ"
        if missing := sorted(old["figures"].keys() ^ new["figures"].keys()):
            yield f"{label}only one has {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
    for document in after.keys() - before.keys():
        yield f"{document}: only in the second"


@click.command("compare")
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--threshold",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 10),
    help="The least change that counts; 0.1: 10 %.",
)
@json_option
def command(before: Path, after: Path, threshold: float, as_json: bool) -> None:
    """What changed from the results BEFORE to AFTER (files or folders); exit code 1 when something got worse."""
    old, new = read_documents(before), read_documents(after)
    found = changes(old, new, threshold)
    if not found:
        raise click.UsageError(f"{before} and {after} have no figure in common")
    counts: Counter[str] = Counter(change.verdict for change in found)
    notes = sorted(differences(old, new))
    if as_json:
        rows = [{**change._asdict(), "percent": _finite(change.percent)} for change in found]
        figures = {f"{verdict.replace(' ', '_')}_figures": counts[verdict] for verdict in (*_WORDS, "no change")}
        click.echo(json.dumps({"bench": "compare", "figures": figures, "changes": rows, "notes": notes}))
    else:
        for note in notes:
            click.echo(f"note: {note}")
        for change in found:
            if change.verdict != "no change":
                click.echo(change.line())
        click.echo(_last_line(counts))
    sys.exit(1 if counts["slower"] else 0)


def _finite(percent: float) -> float | None:
    return round(percent, 2) if percent != float("inf") else None


def _last_line(counts: Counter[str]) -> str:
    total = counts.total()
    told = [f"{counts[verdict]} {_WORDS[verdict]}" for verdict in _WORDS if counts[verdict]]
    return f"of {total} figures: {', '.join(told)}" if told else f"no change in {total} figures"
