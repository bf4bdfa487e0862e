"""The benches: one machine's, a link's between two, a cluster's; their results compared and drawn."""

from __future__ import annotations

COMMANDS = {
    "chaos": "mxbench.chaos.command",
    "cluster": "mxbench.cluster.command",
    "compare": "mxbench.results.compare",
    "control": "mxbench.control.command",
    "drain": "mxbench.control.drain",
    "fanout": "mxbench.fleet.fanout",
    "files": "mxbench.files.command",
    "gpu": "mxbench.gpu.command",
    "kills": "mxbench.control.kills",
    "load": "mxbench.load.command",
    "object": "mxbench.object_store.command",
    "peer": "mxbench.peer.command",
    "report": "mxbench.results.report",
    "storm": "mxbench.storm.command",
    "transfer": "mxbench.transfer.command",
    "update": "mxbench.update.command",
    "vllm": "mxbench.engine.loads",
}
"""`mx bench NAME` → the module with its click command `command`. Kept here, so that naming them imports nothing."""
