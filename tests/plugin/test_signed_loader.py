"""What vLLM's loader does beside `mxcore.engine`, where models have to be signed: nothing that is not verified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys
from vllm.config import LoadConfig
from vllm_plugin.loader import MxModelLoader

said = []

def tell(call):
    try:
        call()
        said.append("nothing")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")

for options in ({"model_signature": "require"}, {"MX_MODEL_SIGNATURE": "requre"}, {}):
    os.environ["MX_MODEL_SIGNATURE"] = "off" if options else "require"
    loader = MxModelLoader(LoadConfig(load_format="auto", model_loader_extra_config=options))
    tell(lambda: loader.load_weights(None, None))
    tell(lambda: next(loader.get_all_weights(None, None)))
    sys.modules["vllm_plugin.engine"] = None
    tell(lambda: loader.load_model(None, None))
print(json.dumps(said))
"""


def test_nothing_is_loaded_that_nobody_verifies() -> None:
    """Weights loaded anew; and where our part cannot even be imported, vLLM's own loader is not asked."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    anew = "SignatureError: weights that are loaded anew into a model are not verified"
    for place, start in enumerate((anew, anew, "ModuleNotFoundError")):
        assert all(line.startswith(start) for line in said[place::3]), said
