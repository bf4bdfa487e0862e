"""A model's files on this machine, found as vLLM's default loader finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxcore.engine import find_checkpoint, model_name


def write(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")


def index(folder: Path, *names: str) -> None:
    text = json.dumps({"weight_map": {f"t{number}": name for number, name in enumerate(names)}})
    (folder / "model.safetensors.index.json").write_text(text)


def found_names(folder: Path) -> list[str]:
    return [file.name for file in find_checkpoint(str(folder)).weight_files]


def test_the_shards_that_the_index_names(tmp_path: Path) -> None:
    write(tmp_path, "b.safetensors", "a.safetensors", "stray.safetensors")
    index(tmp_path, "b.safetensors", "a.safetensors", "a.safetensors")
    checkpoint = find_checkpoint(str(tmp_path))
    assert [file.name for file in checkpoint.weight_files] == ["a.safetensors", "b.safetensors"]
    assert checkpoint.index_file == tmp_path / "model.safetensors.index.json"


def test_a_shard_that_is_missing_means_no_weight_files(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors")
    index(tmp_path, "a.safetensors", "b.safetensors")
    assert found_names(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"t": 1}}', '{"weight_map": {"t": "../x"}}']
)
def test_an_index_that_is_none_is_left_to_vllm(tmp_path: Path, text: str) -> None:
    write(tmp_path, "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert found_names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("model.safetensors", "pytorch_model.bin"), ["model.safetensors"]),
        (("pytorch_model.bin", "x.pt"), ["pytorch_model.bin"]),
        (("consolidated.safetensors", "model.safetensors"), ["consolidated.safetensors"]),
        (("._model.safetensors", "model.safetensors", "original/consolidated.safetensors"), ["model.safetensors"]),
        (("pytorch_model.bin", "training_args.bin"), ["pytorch_model.bin"]),
        (("config.json",), []),
    ],
)
def test_files_as_the_default_loader_chooses_them(tmp_path: Path, files: tuple[str, ...], expected: list[str]) -> None:
    write(tmp_path, *files)
    assert found_names(tmp_path) == expected


def test_an_index_of_others_does_not_hide_consolidated_files(tmp_path: Path) -> None:
    """Ministral's layout: vLLM reads the consolidated file, whatever the other index says."""
    write(tmp_path, "a.safetensors", "consolidated.safetensors")
    index(tmp_path, "a.safetensors")
    assert found_names(tmp_path) == ["consolidated.safetensors"]


def one_tensor(value: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value] * 8)


def test_the_digest_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    """Findings W5, W6 and row 12: consolidated files, a projector's folder, and dot files, which are nobody's."""
    write(tmp_path, "a.safetensors", "._a.safetensors", "2_Dense/x")
    index(tmp_path, "a.safetensors")
    places = [tmp_path / "a.safetensors", tmp_path / "2_Dense" / "model.safetensors"]
    for place in places:
        place.write_bytes(one_tensor(0))
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    digests = {find_checkpoint(str(tmp_path)).digest()}
    for place in places:
        place.write_bytes(one_tensor(1))
        digests.add(find_checkpoint(str(tmp_path)).digest())
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    digests.add(find_checkpoint(str(tmp_path)).digest())
    for value in range(2):
        (tmp_path / "consolidated.safetensors").write_bytes(one_tensor(value))
        digests.add(find_checkpoint(str(tmp_path)).digest())
    assert len(digests) == 6


def test_the_hubs_cache_is_searched_and_nothing_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    write(snapshot, "model.safetensors", "config.json")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)

    checkpoint = find_checkpoint("org/name", None, str(tmp_path))
    assert checkpoint.commit == commit
    assert [file.name for file in checkpoint.weight_files] == ["model.safetensors"]
    assert find_checkpoint(str(snapshot)).commit == commit
    assert find_checkpoint("org/other", None, str(tmp_path)).folder is None
    assert find_checkpoint("no such folder/and/no/name", None, str(tmp_path)).folder is None
    assert model_name(str(snapshot)) == "org/name"
    assert model_name("/models/mine") == "/models/mine"


@pytest.mark.parametrize(
    "written", ["org/name", "org/name/", "./org/name", "{here}/org/name", "{here}/org/../org/name/"]
)
def test_a_folder_has_one_name_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """vLLM takes a folder before it asks the hub: its name is then none of the hub's, whose weights are others."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name(written.format(here=tmp_path)) == str(tmp_path / "org" / "name")


def test_a_name_of_the_hub_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name("org/name") == "org/name"
