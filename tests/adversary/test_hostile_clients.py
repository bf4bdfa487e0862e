"""Each hostile client alone: honest workers hardly notice, neither during it nor after it."""

from __future__ import annotations

import sys

import pytest

from tests.adversary.conftest import AFTER_SECONDS, ATTACK_SECONDS, PUBLISH_TOKEN, Attacked
from tests.adversary.honest import judge
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
    judge(during, f"while a client {name.replace('_', ' ')} ({outcomes})")
    judge(after, f"after a client {name.replace('_', ' ')} ({outcomes})")
    if name == "pins_without_right":
        assert not any(outcome.endswith(" OK") for outcome in outcomes), outcomes
