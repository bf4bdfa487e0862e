"""What a checkpoint is made of: a file, a list, an index, a directory; and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxcore.errors import CheckpointError, StorageError
from mxcore.safetensors import SafetensorsError
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from tests.storage.conftest import Tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "x-1.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "x-2.safetensors")
    return tmp_path


def write_index(folder: Path, weight_map: object, name: str = "x.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


WHOLE = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}


def test_names_dtypes_and_shapes_without_data(checkpoint: Checkpoint, tensors: Tensors) -> None:
    assert set(checkpoint) == set(tensors)
    assert all(checkpoint[name].shape == tuple(tensor.shape) for name, tensor in tensors.items())
    assert checkpoint["bf16"].dtype == "BF16"
    assert checkpoint["fp8"].dtype == "F8_E4M3"
    assert checkpoint.total_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert "2 files, 10 tensors" in repr(checkpoint)


def test_file_list_directory_and_index_give_the_same(folder: Path) -> None:
    files = [folder / "x-1.safetensors", folder / "x-2.safetensors"]
    listed = open_checkpoint(files)
    assert dict(listed) == dict(open_checkpoint(folder))
    assert list(open_checkpoint(files[0])) == ["a", "b"]
    assert list(open_checkpoint(str(files[0]))) == ["a", "b"]
    index = write_index(folder, WHOLE)
    assert dict(open_checkpoint(index)) == dict(open_checkpoint(folder)) == dict(listed)


def test_an_index_says_what_belongs_to_the_checkpoint(folder: Path) -> None:
    save_file({"a": torch.zeros(9)}, folder / "stray.safetensors")
    with pytest.raises(CheckpointError, match="both have 'a'"):
        open_checkpoint(folder)
    write_index(folder, {"a": "x-1.safetensors", "c": "x-2.safetensors"}, "model.safetensors.index.json")
    opened = open_checkpoint(folder)
    assert set(opened) == {"a", "b", "c"}
    assert opened["a"].shape == (2,)


def test_of_a_tensor_in_two_shards_the_index_names_the_one(folder: Path) -> None:
    """Stale copies in reused shards (vllm#54230), and scales that no index lists (findings, rows 3 and 4)."""
    save_file({"c": torch.ones(4), "a": torch.full((7,), 3.0), "a.scale": torch.ones(1)}, folder / "x-2.safetensors")
    write_index(folder, WHOLE, "model.safetensors.index.json")
    opened = open_checkpoint(folder)
    assert set(opened) == {"a", "b", "c", "a.scale"}
    assert opened["a"].shape == (2,)
    write_index(folder, {"b": "x-1.safetensors", "c": "x-2.safetensors"}, "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="both have 'a', and no index says"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x-1.safetensors", "z": "x-2.safetensors"}, "1 of its tensors.*z"),
        ({"a": "x-2.safetensors"}, "1 of its tensors.*a"),
        ({"a": "../x-1.safetensors"}, "no name of a file beside it"),
        ({"a": "/etc/passwd"}, "no name of a file beside it"),
        ({"a": ".."}, "no name of a file beside it"),
        ({"a": ""}, "no name of a file beside it"),
        ({"a": "x\\1.safetensors"}, "no name of a file beside it"),
        ({"a": 1}, "weight_map"),
        (["a"], "weight_map"),
        ({}, "no \\*.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder: Path, weight_map: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_index(folder, weight_map))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"weights": {}}', "nul"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(index)


def test_what_is_not_there_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StorageError, match="nothing"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(StorageError, match="lost"):
        open_checkpoint(write_index(folder, {"a": "lost.safetensors"}))
    with pytest.raises(StorageError, match=r"none\.safetensors\.index\.json"):
        open_checkpoint(tmp_path / "none.safetensors.index.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        open_checkpoint([])


def test_what_no_engine_reads_is_no_matter(folder: Path) -> None:
    """An index of another name, and what macOS leaves beside files (findings, row 12)."""
    write_index(folder, WHOLE)
    write_index(folder, WHOLE, "y.safetensors.index.json")
    for name in ("._x-1.safetensors", "._model.safetensors.index.json"):
        (folder / name).write_bytes(b"AppleDouble")
    assert set(open_checkpoint(folder)) == set(WHOLE)


def test_a_broken_header_is_the_parsers_error(folder: Path) -> None:
    (folder / "x-3.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(SafetensorsError):
        open_checkpoint(folder)


NO_SAFETENSORS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
    "zip archive": b"PK\x03\x04" + bytes(64),
    "pickle": b"\x80\x02ctorch._utils\n",
    "GGUF": b"GGUF\x03" + bytes(64),
    "HTML page": b"<!DOCTYPE html><html><body>Log in</body></html>",
    "XML document": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON": b'{"error": "Repository not found, or you may not see it"}',
    "never filled": bytes(64),
    "cut short": (100).to_bytes(8, "little") + b'{"a":',
    "has 0 bytes": b"",
}


@pytest.mark.parametrize("kind", NO_SAFETENSORS)
def test_what_is_no_safetensors_file_is_named_as_what_it_is(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(NO_SAFETENSORS[kind])
    with pytest.raises(SafetensorsError, match=kind):
        open_checkpoint(file)


def test_a_file_whose_data_is_cut_is_said_to_be(folder: Path) -> None:
    whole = (folder / "x-1.safetensors").read_bytes()
    (folder / "x-1.safetensors").write_bytes(whole[:-4])
    with pytest.raises(SafetensorsError, match="cut short"):
        open_checkpoint(folder)
