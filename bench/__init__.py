"""What `mx bench` and `make demo` run: real processes, real sockets; figures as JSON with --json."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:  # the package `mxbench` lies here; a checkout that was not installed anew finds it so
    sys.path.append(_HERE)
