"""The benches of the wheel: a link between two machines, a cluster of them, results compared and drawn."""

from __future__ import annotations

COMMANDS = {
    "cluster": "mxbench.cluster.command",
    "compare": "mxbench.results.compare",
    "peer": "mxbench.peer.command",
    "report": "mxbench.results.report",
}
"""`mx bench NAME` → the module with its click command `command`. Kept here, so that listing them imports nothing."""
