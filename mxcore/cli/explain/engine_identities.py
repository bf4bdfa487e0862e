"""What a worker with given engine arguments would be called: its identities, asked of the engine's plugin.

A plugin names a function under the entry point group `modelexpress.identities`: it takes the model and the engine's
arguments, and returns one SourceIdentity for each form of weights that such a worker could take. It runs in a process
of its own, because engines log to stdout and keep what they have set up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from mxserver.wire import SettingError
from mxserver.wire.proto import p2p_pb2

GROUP = "modelexpress.identities"
MOST_SECONDS = 300.0


def engine_identities(model: str, arguments: Sequence[str]) -> list[p2p_pb2.SourceIdentity]:
    """Empty where no engine's plugin is installed. Raises SettingError with what the engine said of the arguments."""
    if not entry_points(group=GROUP):
        return []
    read, write = os.pipe()
    code = "from mxcore.cli.explain.engine_identities import tell; tell()"
    with os.fdopen(read, "rb") as answers:
        ran = subprocess.Popen(
            [sys.executable, "-c", code, str(write), model, *arguments],
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={"VLLM_LOGGING_LEVEL": "ERROR", **os.environ},
        )
        os.close(write)
        try:
            _, said = ran.communicate(timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            ran.kill()
            ran.communicate()
            raise SettingError(f"the engine did not say within {MOST_SECONDS:g} s what {model} would be") from None
        told = answers.read()
    if ran.returncode or not told:
        lines = [line for line in said.strip().splitlines() if line.strip()] or ["it said nothing"]
        raise SettingError(f"the engine does not take {' '.join([model, *arguments])}: {lines[-1].strip()}")
    return [p2p_pb2.SourceIdentity.FromString(bytes.fromhex(each)) for each in json.loads(told)]


def tell() -> None:
    """The other process: `descriptor, model, arguments…`."""
    descriptor, model, *arguments = sys.argv[1:]
    [point] = entry_points(group=GROUP)
    found = [identity.SerializeToString().hex() for identity in point.load()(model, arguments)]
    with os.fdopen(int(descriptor), "w") as answers:
        json.dump(found, answers)
