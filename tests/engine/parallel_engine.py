"""One of two processes of a plain engine whose processing has a collective. See `test_siblings`."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from mxcore.agreement import Gather
from mxcore.engine import Fill, gather_over_gloo, load, serving
from mxcore.transfer.serve import Holder
from tests.engine.plain_engine import LAYERS, Layer, PlainEngine, answer
from tests.engine.plain_worker import ROLES
from tests.self_checks import end_self_checks


class ParallelEngine(PlainEngine):
    """Two ranks of one model."""

    def build(self, fill: Fill) -> nn.Module:
        model = nn.Sequential(*(Layer(self.size) for _ in range(LAYERS)))
        fill(model)
        for layer in model:
            largest = layer.weight.abs().max()
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
            layer.process()
            layer._largest_float = float(largest)
        return model.eval()

    def rank(self) -> int:
        return int(distributed.get_rank())

    def world_size(self) -> int:
        return 2

    def siblings(self) -> Gather | None:
        return gather_over_gloo(range(2))


def main(command: dict[str, Any]) -> None:
    """`command`: folder, server, rank, store, report; it may have `options`, `processed`, and of a source: `bad`, the
    rank whose bytes are wrong, `silent`, the rank that offers nothing, and `mute`, the one that gives no chunk."""
    rank = command["rank"]
    if command.get("mute") == rank:
        Holder.ask = lambda *_, **__: threading.Event().wait()  # type: ignore[assignment,method-assign]
    if "bad" in command:
        end_self_checks()
    store = distributed.FileStore(command["store"], 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    options = {"server_address": command["server"], "worker_host": "127.0.0.1", "worker_grpc_port": 0}
    options |= command.get("options", {})
    engine = ParallelEngine(
        Path(command["folder"]),
        {**options, "report_path": str(Path(command["report"]).with_name("{rank}-" + Path(command["report"]).name))},
        processed_weights_move=command.get("processed", False),
    )
    report = Path(engine.options["report_path"].replace("{rank}", str(rank)))
    model = load(engine, ROLES["both"])
    said = {"answer": answer(model), "report": json.loads(report.read_text())}
    if command.get("silent") == rank:
        serving.leave("it is told to")
    if command.get("bad") == rank:
        (entry,) = serving._offers
        for tensor in entry.offer._weights.found.kept.values() if entry.offer._weights else ():
            with torch.no_grad():
                tensor.view(-1)[:1].add_(1)
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
