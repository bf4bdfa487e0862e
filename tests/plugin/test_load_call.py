"""How a loader of vLLM's is called: its versions differ in `prefix`, and other packages wrap it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json
from vllm_plugin import compat

class Named:  # from 0.15.1 on
    def load_model(self, vllm_config, model_config, prefix=""):
        return [vllm_config, model_config, prefix]

class Before:  # up to 0.14.1
    def load_model(self, vllm_config, model_config):
        return [vllm_config, model_config, "none"]

class Wrapped:  # somebody's wrapper, which does not show what it passes on
    def __init__(self, loader):
        self.loader = loader

    def load_model(self, *args, **kwargs):
        return self.loader.load_model(*args, **kwargs)

loaders = [Named(), Before(), Wrapped(Named())]
got = [compat.load_model(loader, "vllm", "model", prefix) for loader in loaders for prefix in ("", "draft")]
got.append(compat.load_model(Wrapped(Before()), "vllm", "model", ""))
print(json.dumps(got))
"""


def test_prefix_reaches_who_takes_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout.splitlines()[-1])
    assert [prefix for _, _, prefix in got] == ["", "draft", "none", "none", "", "draft", "none"]
    assert all(call[:2] == ["vllm", "model"] for call in got)
