"""The smallest engine: a plain torch module, filled by name and processed by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxcore.agreement import Gather
from mxcore.engine import EngineWatch, Files, Fill, Kind, Source, find_checkpoint, lazy_weights, model_name
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.plan import Progress
from mxcore.transfer.member import PROTOCOL_VERSION
from mxserver.wire.proto import p2p_pb2

SIZE = 512
LAYERS = 3
_ROTARY: dict[int, torch.Tensor] = {}  # kept for the next model of the process, as vLLM keeps its rotary embeddings


class Layer(nn.Module):
    """A matrix, a table that all layers share, and after processing the matrix in another order and a number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size), requires_grad=False)
        self.table = _ROTARY.setdefault(size, torch.linspace(0.5, 1.5, size))

    def process(self) -> None:
        """What a kernel would want: no parameter has the checkpoint's shape any more."""
        self.packed = self.weight.t().contiguous()
        self._gain_float = 1.0 + float(self.weight.abs().mean())
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.packed * self._gain_float * self.table)


def write_checkpoint(folder: Path, seed: int = 0, size: int = SIZE) -> Path:
    """A checkpoint of the model in two files."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{index}.weight": torch.rand(size, size, generator=generator) - 0.5 for index in range(LAYERS)}
    for number, names in enumerate((["0.weight"], ["1.weight", "2.weight"])):
        save_file({name: tensors[name] for name in names}, folder / f"model-{number}.safetensors")
    return folder


def answer(model: nn.Module, size: int = SIZE) -> str:
    """A digest of what the model makes of a fixed input: equal only where every weight is."""
    with torch.no_grad():
        return hashlib.sha256(model(torch.linspace(-1, 1, size)).numpy().tobytes()).hexdigest()


class PlainEngine:
    """See `mxcore.engine.Engine`; one rank. `size` is the model's, `events` what was asked of the engine, in order."""

    part = ""
    revision: str | None = None
    download_dir: str | None = None
    device = torch.device("cpu")
    accelerator = "cpu"
    instance = "plain"
    own_loader = "the plain loader"
    configuration = ()

    def __init__(
        self, folder: Path, options: Mapping[str, Any], *, processed_weights_move: bool = False, size: int = SIZE
    ) -> None:
        self.model = str(folder)
        self.options = options
        self.processed_weights_move = processed_weights_move
        self.size = size
        self.events: list[str] = []
        self.watched: list[EngineWatch] = []

    def building_state(self) -> Callable[[], None]:
        return lambda: self.events.append("restore")

    def build(self, fill: Fill) -> nn.Module:
        self.events.append("build")
        model = nn.Sequential(*(Layer(self.size) for _ in range(LAYERS)))
        fill(model)
        self.events.append("process")
        for layer in model:
            layer.process()
        return model.eval()

    def fill(self, model: nn.Module, source: Source, settings: WorkerSettings, progress: Progress) -> int:
        self.events.append("fill")
        reads: list[int] = []
        if isinstance(source, Files):
            found = find_checkpoint(str(source.folder or self.model))
            if not found.weight_files:
                raise FileNotFoundError(f"no weights in {found.folder}")
            checkpoint = open_checkpoint(found.weight_files)
            tensors = lazy_weights(
                checkpoint,
                mode=settings.reader_mode,
                told=lambda done_bytes: progress(done_bytes, checkpoint.total_bytes),
                lazy_least_bytes=0,
                needed=source.needed,
                record=source.record,
                read=reads.append,
                verified=source.verified,
            )
        else:
            tensors = source.tensors(None, progress)
        parameters = dict(model.named_parameters())
        for name, tensor in tensors:
            parameters[name].copy_(tensor)
        return sum(reads)

    def fill_placeholder(self, model: nn.Module) -> None:
        self.events.append("placeholder")
        for parameter in model.parameters():
            parameter.zero_()

    def finish_filling(self, model: nn.Module) -> None:
        """Nothing is left to do."""

    def identity(self, kind: Kind, revision: str, checkpoint: str | None) -> p2p_pb2.SourceIdentity:
        found = find_checkpoint(self.model)
        digest = found.digest() if checkpoint is None else checkpoint
        return p2p_pb2.SourceIdentity(
            mx_version=PROTOCOL_VERSION,
            model_name=model_name(self.model),
            revision=revision,
            extra_parameters={"layout": kind, "checkpoint": digest},
        )

    def rank(self) -> int:
        return 0

    def world_size(self) -> int:
        return 1

    def ranks_on_node(self) -> int:
        return 1

    def barrier(self, timeout_seconds: float) -> str:
        self.events.append("barrier")
        return ""

    def siblings(self) -> Gather | None:
        return None

    def offers_until(self) -> str:
        """Nothing changes weights here."""
        return ""

    def loses_memory(self) -> str | None:
        return None

    def watch(self, watch: EngineWatch) -> None:
        self.watched.append(watch)
