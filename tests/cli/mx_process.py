"""`mx` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def mx(*arguments: str, **environ: str) -> Ran:
    """`mx` as a process of its own, without the settings of whoever runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS_"))}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from mxcore.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**inherited, **environ},
        cwd=ROOT,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)
