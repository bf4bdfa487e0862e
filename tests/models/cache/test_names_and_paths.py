"""What may be a model, a revision, a file; and what a damaged record may do: nothing."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.models import FileRecord, ModelKey, ModelRecord, checked_revision, model_name
from mxserver.models.cache_layout import CacheLayout, check_paths
from mxserver.models.errors import BadModelName, UnsafePath
from mxserver.models.names import is_weight
from mxserver.models.record import BadRecord, record_from_json
from mxserver.wire import open_regular_below, path_problem
from mxserver.wire.proto import model_pb2
from mxserver.wire.relative_path import MAX_PATH_BYTES, rename_below

HF = model_pb2.HUGGING_FACE
GOOD_PATHS = ["config.json", "a/b/c.safetensors", ".gitattributes", "model-00001-of-00002.safetensors", "ü/日本.txt"]
BAD_PATHS = [
    *("", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./a", "a//b", "a/", "a\\b", "..\\x", "C:", "c:/x"),
    *(
        "C:\\x",
        "a:stream",
        "a\0b",
        "a\nb",
        "\x7f",
        "nul",
        "NUL.txt",
        "sub/con",
        "com1.json",
        "lpt9",
        "x.",
        "x ",
        "a./b",
    ),
    *("\\\\server\\share", "x" * 256, "a/" * MAX_PATH_BYTES, "\ud800"),
]


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_paths_that_may_be(path: str) -> None:
    assert path_problem(path) is None


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_may_not_be(path: str) -> None:
    assert path_problem(path)


@given(st.text(alphabet=string.printable + "é\\\0..//", max_size=40))
def test_accepted_path_stays_below_its_folder(path: str) -> None:
    if path_problem(path) is None:
        joined = os.path.normpath(os.path.join("/root", path))  # noqa: PTH118
        assert joined.startswith("/root/")
        assert joined == f"/root/{path}"


def test_list_of_paths_must_fit_together() -> None:
    model = model_name(HF, "org/x")
    check_paths(model, GOOD_PATHS)
    for paths in (["a", "a/b"], ["a/b", "a/b/c"], ["a", "a"], ["ok", "../x"]):
        with pytest.raises(UnsafePath):
            check_paths(model, paths)


def test_rename_below_follows_no_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    source = tmp_path / "source"
    source.write_bytes(b"x")
    rename_below(source, folder, "a/b/c")
    assert (folder / "a" / "b" / "c").read_bytes() == b"x"
    (folder / "link").symlink_to(outside)
    source.write_bytes(b"y")
    with pytest.raises(OSError, match=r"directory|symbolic"):
        rename_below(source, folder, "link/c")
    assert not list(outside.iterdir())


def test_open_regular_below(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "b").write_bytes(b"x")
    (folder / "link").symlink_to("blobs/b")
    os.close(open_regular_below(folder, folder / "link"))
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("../secret")
    os.mkfifo(folder / "fifo")
    for name in ("out", "up", "fifo", "blobs"):
        with pytest.raises(PermissionError):
            open_regular_below(folder, folder / name)
    with pytest.raises(FileNotFoundError):
        open_regular_below(folder, folder / "none")


@pytest.mark.parametrize("name", ["gpt2", "org/name", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e"])
def test_repositories(name: str) -> None:
    assert model_name(HF, name).name == name


@pytest.mark.parametrize(
    ("provider", "name", "kept"),
    [
        (model_pb2.S3, "s3://bucket/a/b/", "s3://bucket/a/b"),
        (model_pb2.GCS, "gs://bucket", "gs://bucket"),
        (model_pb2.AZURE, "az://container/a", "az://container/a"),
        (model_pb2.AZURE, "abfss://c@account.dfs.core.windows.net/a", "abfss://c@account.dfs.core.windows.net/a"),
        (model_pb2.FILE, "file:///srv/models/x", "file:///srv/models/x"),
    ],
)
def test_urls(provider: int, name: str, kept: str) -> None:
    assert model_name(provider, name).name == kept


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        *((HF, name) for name in ("", "/", "a/", "/a", "a/b/c", "..", "a/..", "a--b", "-a", "a b", "a\0b", "x" * 200)),
        (model_pb2.S3, "bucket/a"),
        (model_pb2.S3, "gs://bucket/a"),
        (model_pb2.S3, "s3://../a"),
        (model_pb2.S3, "s3://bucket/a/../b"),
        (model_pb2.S3, "s3:///a"),
        (model_pb2.FILE, "file://host/a"),
        (model_pb2.FILE, "file:///"),
        (model_pb2.NGC, "org/x"),
        (4711, "org/x"),
    ],
)
def test_names_that_are_refused(provider: int, name: str) -> None:
    with pytest.raises(BadModelName):
        model_name(provider, name)


def test_revisions() -> None:
    hub, s3 = model_name(HF, "org/x"), model_name(model_pb2.S3, "s3://b/x")
    assert checked_revision(hub, "") == "main"
    assert checked_revision(hub, "refs/pr/1") == "refs/pr/1"
    assert checked_revision(s3, "") == ""
    for revision in ("../x", "a b", "x^", "a..b/../c", "/x", "@{1}x", "a\nb"):
        with pytest.raises(BadModelName):
            checked_revision(hub, revision)
    with pytest.raises(BadModelName):
        checked_revision(s3, "main")


def test_weights_are_known_by_their_names() -> None:
    assert all(is_weight(f"x/model{suffix}") for suffix in (".bin", ".safetensors", ".GGUF", ".ckpt.index", ".pt"))
    assert not any(map(is_weight, ("model.safetensors.index.json", "config.json", "tokenizer.model", "binary")))


def record() -> ModelRecord:
    key = ModelKey(model_name(HF, "org/x"), "a" * 40)
    return ModelRecord(key, (FileRecord("a/b", 3, "xxh3-64:0", "models--org--x/blobs/b"),), True, 1)


def test_record_comes_back() -> None:
    assert record_from_json(record().to_json()) == record()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("provider", "NOBODY"),
        ("name", "../x"),
        ("files", [{"path": "../x", "size": 1, "digest": "", "place": "x"}]),
        ("files", [{"path": "x", "size": 1, "digest": "", "place": "/etc/passwd"}]),
        ("files", [{"path": "x", "size": -1, "digest": "", "place": "x"}]),
        ("files", [{"path": "x", "size": True, "digest": "", "place": "x"}]),
        ("files", [{"path": "x"}]),
        ("files", None),
    ],
)
def test_damaged_records_are_refused(field: str, value: object) -> None:
    fields = json.loads(record().to_json()) | {field: value}
    with pytest.raises(BadRecord):
        record_from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', "\0"])
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(BadRecord):
        record_from_json(text)


def test_keys_are_different(tmp_path: Path) -> None:
    layout = CacheLayout(tmp_path)
    hub = ModelKey(model_name(HF, "org/x"), "a" * 40)
    other = ModelKey(model_name(HF, "org/x"), "b" * 40)
    s3 = ModelKey(model_name(model_pb2.S3, "s3://org/x"), "a" * 40)
    assert len({layout.record(key) for key in (hub, other, s3)}) == 3
    assert layout.place(hub, "a/b", "f" * 64) == f"models--org--x/blobs/{'f' * 64}"
    assert layout.place(s3, "a/b", "").endswith(f"{'a' * 40}/a/b")
