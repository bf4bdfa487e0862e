"""A second engine, in plain torch: python examples/second_engine.py FOLDER, with MODEL_EXPRESS_URL set.

What an engine has to give so that its models are loaded and shared as vLLM's are: the Protocol `mxcore.engine.Engine`,
and nothing else. The first process reads FOLDER; the next ones take the weights from it, processed, memory to memory.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mxcore.engine import EngineWatch, Files, Fill, Kind, Role, Source, find_checkpoint, lazy_weights, load, model_name
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.plan import Progress
from mxcore.transfer.member import PROTOCOL_VERSION
from mxserver.wire.proto import p2p_pb2

SIZE = 256


class Layer(nn.Module):
    """A matrix, which processing brings into a kernel's order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, SIZE), requires_grad=False)

    def process(self) -> None:
        """A fake: what other workers are sent is this outcome, so that they need not do it again."""
        self.packed = self.weight.t().contiguous()
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.packed)


class SecondEngine:
    """One process, one rank, host memory."""

    part = ""  # this engine has one model: no draft beside it
    revision: str | None = None  # of the model on the hub
    download_dir: str | None = None
    device = torch.device("cpu")  # where all weights are
    accelerator = "cpu"  # as `mx sources` shows it
    instance = "second"  # which of this process' engines it is
    own_loader = "the second engine's loader"  # for the log
    configuration = ()  # objects that describe the run: what hangs on them is no weight
    processed_weights_move = True  # False where processing packs weights away: raw ones are exchanged then

    def __init__(self, model: str, options: dict[str, str]) -> None:
        self.model = model
        self.options = options  # settings of docs/reference/settings.md, by name; and `report_path`
        self.watched: EngineWatch | None = None

    # Building a model: mxcore calls `build`, which calls `fill(model)` between construction and processing.

    def building_state(self) -> Callable[[], None]:
        """Nothing outside of the model is changed by building it."""
        return lambda: None

    def build(self, fill: Fill) -> nn.Module:
        model = nn.Sequential(Layer(), Layer())
        fill(model)
        for layer in model:
            layer.process()
        return model.eval()

    def fill(self, model: nn.Module, source: Source, settings: WorkerSettings, progress: Progress) -> int:
        """From the engine's files, or from tensors that come from elsewhere; returns the bytes that were read here."""
        read: list[int] = []
        if isinstance(source, Files):  # with `needed`, only what no other process could give
            files = find_checkpoint(str(source.folder or self.model)).weight_files
            tensors = lazy_weights(
                open_checkpoint(files), mode=settings.read_mode, needed=source.needed, read=read.append
            )
        else:
            tensors = source.tensors(None, progress)
        parameters = dict(model.named_parameters())
        for name, tensor in tensors:
            parameters[name].copy_(tensor)
        return sum(read)

    def fill_placeholder(self, model: nn.Module) -> None:
        """Other values come after processing: these only have to get through it."""
        for parameter in model.parameters():
            parameter.zero_()

    # Who may exchange weights with whom.

    def finish_filling(self, model: nn.Module) -> None:
        """Nothing: `fill` copies tensors, and that is all."""

    def identity(self, kind: Kind, revision: str, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        """Everything that changes the bytes: the checkpoint, the dtype, the parallel layout, this engine's version."""
        digest = find_checkpoint(self.model).digest() if checkpoint is None else checkpoint
        return p2p_pb2.SourceIdentity(
            mx_version=PROTOCOL_VERSION,
            model_name=model_name(self.model),
            revision=revision,
            dtype="float32",
            backend_framework_version="second-engine-1",
            extra_parameters={"layout": kind, "checkpoint": digest},
        )

    def rank(self) -> int:
        return 0

    def world_size(self) -> int:
        return 1

    def ranks_on_node(self) -> int:
        return 1

    def barrier(self, timeout_seconds: float) -> str:
        """With several ranks: waits for all, and says who did not come."""
        return ""

    def siblings(self) -> None:
        """With several ranks: `mxcore.engine.gather_over_gloo`, by which they agree on each step."""

    # What happens to the weights later.

    def offers_until(self) -> str:
        """Nothing changes weights here."""
        return ""

    def loses_memory(self) -> str | None:
        """A mode in which weights vanish and nobody tells mxcore: then they are not offered."""
        return None

    def watch(self, watch: EngineWatch) -> None:
        """Tell it before weights are changed, sleep or vanish (`changing`, `sleeping`, `ending`), and after `awake`."""
        self.watched = watch

    def shut_down(self) -> None:
        if self.watched is not None:
            self.watched.ending(self.instance)


def main(folder: str) -> None:
    """Loads, answers, and serves others until its input ends."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        engine = SecondEngine(folder, {"report_path": str(report)})
        model = load(engine, Role("second", pulls=True, reads_storage=True, offers=True))
        told = json.loads(report.read_text())
    with torch.no_grad():
        answer = model(torch.linspace(-1, 1, SIZE))
    print(f"{told['path']}, {told['layout']} weights, answer {answer.double().sum().item():.12f}", flush=True)
    sys.stdin.read()
    engine.shut_down()


if __name__ == "__main__":
    main(sys.argv[1])
