"""The files and tensors that we read of a folder beside those of vLLM's own loader and of safetensors.

The table in docs/explanation/storage.md is what `python -m tests.vllm.weight_file_table` prints. In a process of its
own, since importing vLLM warns.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from mxcore.engine import Streamed, find_checkpoint, lazy_weights
from mxcore.errors import CheckpointError
from mxcore.settings import load_settings
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.remote import LocalFolder, open_remote
from mxserver.wire import MxError
from tests.core.safetensors.headers import entry, file_of
from vllm_plugin.storage_loader import StorageLoader, opened_as_by_vllm

BEGIN = "<!-- made by python -m tests.vllm.weight_file_table -->\n"
INDEX = "model.safetensors.index.json"
SHARDS = ("a.safetensors", "b.safetensors")

Files = dict[str, bytes]


def tensors(**values: int) -> bytes:
    """A file of tensors that hold one number each."""
    return save({name: torch.tensor([float(value)]) for name, value in values.items()})


def index(**files: str) -> bytes:
    return json.dumps({"weight_map": files}).encode()


SHARDED: Files = {
    SHARDS[0]: tensors(t=1),
    SHARDS[1]: tensors(u=2),
    INDEX: index(t=SHARDS[0], u=SHARDS[1]),
}
F4 = file_of({"w": entry("F4", [2, 8], 0, 8)}, bytes(8))

CASES: dict[str, Files] = {
    "safetensors and `.bin`": {"model.safetensors": tensors(t=1), "pytorch_model.bin": b"x"},
    "`.bin`, `training_args.bin`, `.pt`": {"pytorch_model.bin": b"x", "training_args.bin": b"x", "x.pt": b"x"},
    "`.pt`, `optimizer.pt`": {"x.pt": b"x", "optimizer.pt": b"x"},
    "`consolidated*.safetensors` beside shards and their index": {
        **SHARDED,
        "consolidated.safetensors": tensors(t=9),
    },
    "the same, each with its index": {
        **SHARDED,
        "consolidated.safetensors": tensors(t=9),
        "consolidated.safetensors.index.json": index(t="consolidated.safetensors"),
    },
    "shards, their index, one more file": {**SHARDED, "stray.safetensors": tensors(t=9)},
    "dot files of macOS beside shards and index": {**SHARDED, f"._{SHARDS[0]}": b"x", f"._{INDEX}": b"x"},
    "names in capitals beside a `.bin`": {"A.SAFETENSORS": tensors(t=1), "x.bin": b"x"},
    "an index that lists a shard that is not there": {SHARDS[0]: SHARDED[SHARDS[0]], INDEX: SHARDED[INDEX]},
    "a tensor of a shard that the index does not name": {**SHARDED, SHARDS[0]: tensors(t=1, scale=3)},
    "a tensor in two shards, of which the index names the first": {**SHARDED, SHARDS[1]: tensors(t=9, u=2)},
    "a tensor in two files without an index": {SHARDS[0]: tensors(t=1), SHARDS[1]: tensors(t=9, u=2)},
    "a tensor that the index names and its shard lacks": {
        **SHARDED,
        INDEX: index(t=SHARDS[0], u=SHARDS[1], lost=SHARDS[1]),
    },
    '`"__metadata__": null`, as MLX writes it': {
        "model.safetensors": file_of({"__metadata__": None, "t": entry("F32", [1], 0, 4)}, bytes(4))
    },
    "F4 [2, 8]": {"model.safetensors": F4},
    "F6_E2M3 [4]": {"model.safetensors": file_of({"w": entry("F6_E2M3", [4], 0, 3)}, bytes(3))},
    "a Git LFS pointer as `model.safetensors`": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"},
}
REASONS = {
    "a tensor in two shards, of which the index names the first": "vLLM gives both, and the later one stays in the "
    "model: a stale copy, by the index (vllm#54230)",
    "a tensor in two files without an index": "nothing says which one is right; vLLM's own reader then takes these "
    "files under `--load-format mx`, with a warning",
    "a tensor that the index names and its shard lacks": "a part of the model is missing; of a quantised one vLLM "
    "does not notice",
}

Tensors = dict[str, tuple[str, list[int], list[int]]]


def laid_out(root: Path) -> list[Path]:
    folders = [root / str(number) for number in range(len(CASES))]
    for folder, files in zip(folders, CASES.values(), strict=True):
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return folders


def asked(make: Callable[[], object]) -> object:
    """What it gives, or the name of the error that it raises."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - of whatever kind
        return type(error).__name__


def of_tensors(found: Iterable[tuple[str, torch.Tensor]]) -> list[list[object]]:
    return [
        [name, str(tensor.dtype), list(tensor.shape), tensor.flatten().view(torch.uint8).tolist()]
        for name, tensor in found
    ]


def by_safetensors(files: list[str]) -> list[list[object]]:
    found = []
    for file in files:
        with safe_open(file, "pt") as opened:
            found += [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118
    return of_tensors(found)


def theirs(folder: Path) -> tuple[object, object, object]:
    """Of vLLM's own loader: its files, its tensors, and what safetensors gives of the same files."""
    loader = DefaultModelLoader(LoadConfig())
    files = asked(lambda: sorted(loader._prepare_weights(str(folder), None, None, True, None)[1]))
    if not isinstance(files, list) or not files[0].endswith(".safetensors"):
        return files, None, None
    by_vllm = asked(lambda: of_tensors(safetensors_weights_iterator(files, False)))
    return files, by_vllm, asked(lambda: by_safetensors(files))


def shown(found: object) -> str:
    """The files or tensors of an answer; of a tensor that comes twice, the later one: that stays in the model."""
    if found is None:
        return "-"
    if isinstance(found, str):
        return f"refuses ({found})"
    assert isinstance(found, list)
    return ", ".join(found) if found and isinstance(found[0], str) else shown_tensors(found)


def shown_tensors(found: list[list[object]]) -> str:
    last = {str(name): (dtype, shape, data) for name, dtype, shape, data in found}
    return ", ".join(f"{name} {place(*value)}" for name, value in sorted(last.items()))


def place(dtype: object, shape: object, data: object) -> str:
    assert isinstance(data, list)
    if dtype == "torch.float32":
        value = torch.tensor(data, dtype=torch.uint8).view(torch.float32)
        return f"= {int(value)}"
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def ours(make: Callable[[], list[list[object]]]) -> object:
    try:
        return make()
    except MxError as error:
        return error.code


def read_by_us(folder: Path) -> list[list[object]]:
    return of_tensors(lazy_weights(open_checkpoint(folder)))


def rows(root: Path) -> list[tuple[str, str, str, str, str]]:
    made = []
    for case, folder in zip(CASES, laid_out(root), strict=True):
        files, by_vllm, plainly = theirs(folder)
        relative = [Path(file).name for file in files] if isinstance(files, list) else files
        chosen = [file.name for file in find_checkpoint(str(folder)).weight_files]
        mine = ours(lambda folder=folder: read_by_us(folder)) if by_vllm is not None else None  # type: ignore[misc]
        assert chosen == (relative if isinstance(relative, list) else []), case
        if by_vllm is not None:
            check_remote(folder)
            check_under_vllm(folder, chosen)
        if isinstance(relative, str):
            by_vllm = plainly = relative
            mine = ours(lambda folder=folder: read_by_us(folder))  # type: ignore[misc]
        made.append((case, shown(relative), shown(by_vllm), shown(plainly), shown(mine)))
    return made


def check_remote(folder: Path) -> None:
    """The remote reader has the same tensors, or the same reason to have none."""

    def names(opened: Callable[[], object]) -> object:
        try:
            return repr(dict(opened()))  # type: ignore[call-overload]
        except MxError as error:
            return error.code

    remote, local = (lambda: open_remote(LocalFolder(folder))), (lambda: open_checkpoint(folder))
    assert names(remote) == names(local)


def check_under_vllm(folder: Path, chosen: list[str]) -> None:
    """What the plugin reads of vLLM's list of files is what is read of the folder."""
    files = [folder / name for name in chosen]
    try:
        assert dict(opened_as_by_vllm(files)) == dict(open_checkpoint(folder))
    except MxError as error:
        assert error.code  # noqa: PT017 - both ways refuse it: the first one was asked


def table(made: list[tuple[str, str, str, str, str]]) -> str:
    lines = ["| in the folder | files | vLLM 0.32 | safetensors 0.8 | ours |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in made]
    differ = [
        f"- {case}: {REASONS[case]}."
        for case, _, by_vllm, _, mine in made
        if by_vllm != mine and not (by_vllm.startswith("refuses") and mine.startswith("refuses"))
    ]
    return "\n".join([*lines, "", "Where ours differs from vLLM:", "", *differ]) + "\n"


def check_strategies(tmp_path: Path) -> None:
    """torchao: what its checkpoints hold are parts of tensors that only its own iterator puts together."""
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(1)}, file)
    loader = StorageLoader(LoadConfig(), load_settings({}), "m", Streamed(open_checkpoint(file), None), lambda *_: None)

    def vllms(*_: object, **__: object) -> str:
        return "theirs"

    assert loader._weights(vllms, [str(file)], False, "torchao") == "theirs"
    assert loader._weights(vllms, [str(file)], False, safetensors_load_strategy="torchao") == "theirs"
    for known in (None, "lazy", "eager", "prefetch"):
        assert dict(loader._weights(vllms, [str(file)], False, known)) == {"t": torch.ones(1)}
    loader.load_config.safetensors_load_strategy = "torchao"
    with pytest.raises(CheckpointError, match="'torchao'"):
        next(iter(loader._streamed(loader._source)))


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        check_strategies(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(BEGIN + table(rows(Path(folder))) + "<!-- end -->\n")


if __name__ == "__main__":
    main()
