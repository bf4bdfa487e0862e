"""The benches of the wheel: a link between two machines, a cluster of them, results compared and drawn."""

from __future__ import annotations

COMMANDS = {
    "compare": "mxbench.results.compare",
    "report": "mxbench.results.report",
}
"""`mx bench NAME` → the module with its click command `command`. Kept here, so that listing them imports nothing."""
