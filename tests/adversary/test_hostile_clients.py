"""Each hostile client alone: honest workers hardly notice, neither during it nor after it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.adversary.conftest import AFTER_SECONDS, ATTACK_SECONDS, PUBLISH_TOKEN, Attacked
from tests.adversary.honest import Seen, judge
from tests.adversary.hostile import HOSTILE

STRANGERS = ("never_ends", "sends_100_mib", "floods_tokens")  # these need no right, so they try without one too
CASES = [(name, PUBLISH_TOKEN) for name in HOSTILE] + [(name, "") for name in STRANGERS]


@pytest.mark.parametrize(
    ("name", "token"), CASES, ids=[f"{name}{'' if token else ' of a stranger'}" for name, token in CASES]
)
def test_hostile_client(attacked: Attacked, name: str, token: str, capsys: pytest.CaptureFixture[str]) -> None:
    with attacked.under(name, token) as outcomes:
        during = attacked.honest.observe(ATTACK_SECONDS)
    after = attacked.honest.observe(AFTER_SECONDS)
    with capsys.disabled():
        sys.stdout.write(f"\n{name} {outcomes}\n  during: {during}\n  after:  {after}\n")
    if figures := os.environ.get("ATTACK_FIGURES"):
        write_figures(Path(figures), f"{name}{'' if token else ' of a stranger'}", (during, after))
    judge(during, f"while a client {name.replace('_', ' ')} ({outcomes})")
    judge(after, f"after a client {name.replace('_', ' ')} ({outcomes})")
    if name == "pins_without_right":
        assert not any(outcome.endswith(" OK") for outcome in outcomes), outcomes


def write_figures(place: Path, name: str, seen: tuple[Seen, ...]) -> None:
    """A line for `mx bench control`."""
    failures = {key: len(reasons) for one in seen for key, reasons in one.failures.items()}
    figures = {
        "name": name,
        "p99_seconds": max(one.p99(call) for one in seen for call in ("heartbeat", "listing")),
        "machine_p99_seconds": max(one.p99("machine") for one in seen),
        "rss_mib": max(one.most_rss_mib for one in seen),
        "failures": failures,
    }
    with place.open("a") as lines:
        lines.write(json.dumps(figures) + "\n")
