"""`python -m mxbench.gpu.fleet` on the stand-in: every scene of it runs, with NIXL between its processes."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.cuda.stand_in import ROOT, StandIn

SMALL = ("--tensors", "8", "--tensor-mib", "4", "--chunk-mib", "0.25", "--slow", "16MB")


def test_every_receiver_ends_up_right_whoever_is_killed(loaded: StandIn) -> None:
    command = [sys.executable, "-m", "mxbench.gpu.fleet", *SMALL, "--stand-in", str(loaded.path), "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["stand_in"] is True
    found = document["found"]
    assert [scene["right"] for scene in found.values()] == [True] * 5, found
    holders = {name: scene["holders"] for name, scene in found.items() if "holders" in scene}
    assert holders.pop("two holders") in (1, 2)  # one that is faster may give all of it
    assert holders == {"one holder": 1, "from it": 1, "source killed in the middle": 2}
    assert {scene["transport"] for scene in found.values() if "transport" in scene} == {"cuda-ipc"}
