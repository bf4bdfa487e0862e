"""Every test of the storage part leaves nothing behind: no memory, no exports, no file, no mapping, nothing counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxcore.memory.host_buffer import live_host_buffers
from mxcore.reading import file_set
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.plan import budget

MODES = ("auto", "buffered", "mapped", "direct", "uring")
Tensors = dict[str, torch.Tensor]


def _live() -> tuple[int, ...]:
    return (
        live_host_buffers(),
        file_set.live_file_descriptors(),
        file_set.live_mappings(),
        budget().held_bytes,
    )


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    if any(_live()):
        gc.collect()  # an exception's traceback may hold a buffer in a cycle
    assert _live() == (0, 0, 0, 0)


@pytest.fixture(scope="session")
def tensors() -> Tensors:
    """Every kind: bf16, fp16, fp8, bool, integers, a scalar, empty ones, one larger than a piece."""
    torch.manual_seed(3)
    return {
        "bf16": torch.randn(100, 33).bfloat16(),
        "fp16": torch.randn(64, 7).half(),
        "fp8": torch.randn(64, 65).to(torch.float8_e4m3fn),
        "fp8_e5m2": torch.randn(3, 5).to(torch.float8_e5m2),
        "cube": torch.randn(7, 5, 11),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bool": torch.rand(13) > 0.5,
        "int64": torch.arange(17),
        "large": torch.randn(3000, 1000),
    }


@pytest.fixture(scope="session")
def checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two files: the header of the second has an odd length, so that its tensors begin at odd bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, folder / "model-2.safetensors")
    shifted(folder / "model-2.safetensors", 3)
    return open_checkpoint(folder)


def shifted(file: Path, blanks: int) -> None:
    """Pads a file's header by blanks, so that its data begins somewhere else."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * blanks
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    raw = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*raw)


Maker = Callable[[Tensors], Checkpoint]


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    """Writes tensors into a file of their own and opens it."""
    count = iter(range(1000))

    def make(tensors: Tensors) -> Checkpoint:
        file = tmp_path / f"{next(count)}.safetensors"
        save_file(tensors, file)
        return open_checkpoint(file)

    return make
