"""Files and tensors that we read of a folder are vLLM's loader's, but where docs/explanation/storage.md says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_docs_have_the_table_that_vllm_safetensors_and_we_make() -> None:
    command = [sys.executable, "-m", "tests.vllm.weight_file_table"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    made = done.stdout[done.stdout.index("<!-- made by") :]
    assert made in (ROOT / "docs" / "explanation" / "storage.md").read_text()
