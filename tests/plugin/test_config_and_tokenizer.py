"""What is done before vLLM reads its configuration: it never ends vLLM's start."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.object_store.conftest import make_checkpoint
from tests.object_store.spelt_store import spelt_store
from tests.small_disk import SmallDisk
from vllm_plugin import config_and_tokenizer, configuration_process


@dataclass
class Arguments:
    """As much of vLLM's EngineArgs as is looked at."""

    model: Any
    load_format: str = "mx"
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    served_model_name: list[str] | None = None
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MX_MODEL_URI", "MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS", "MODEL_EXPRESS_NO_SHARED_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_model_that_is_no_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        pytest.fail("it was not to be looked at")

    monkeypatch.setattr(config_and_tokenizer, "_prepare", never)
    config_and_tokenizer.prepare(Arguments(None))


def test_a_folder_stays_what_it_is(tmp_path: Path) -> None:
    arguments = Arguments(str(tmp_path))
    config_and_tokenizer.prepare(arguments)
    assert arguments == Arguments(str(tmp_path))


@pytest.mark.parametrize(("uri", "lines"), [("", 0), ("s3://bucket/model", 1)])
def test_bad_settings_are_told_here_only_where_they_matter_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, uri: str, lines: int
) -> None:
    """The loader tells them in the engine's process; but without its small files an engine would not come so far."""
    monkeypatch.setenv("MX_STALL_TIMEOUT_SECS", "soon")
    monkeypatch.setenv("MX_MODEL_URI", uri)
    config_and_tokenizer.prepare(Arguments(str(tmp_path)))
    assert caplog.text.count("MX_STALL_TIMEOUT_SECS='soon' is refused") == lines


def test_what_goes_wrong_is_a_line_and_vllm_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MX_MODEL_URI", str(tmp_path / "nowhere"))
    arguments = Arguments("org/name")
    with caplog.at_level(logging.WARNING):
        config_and_tokenizer.prepare(arguments)
    assert arguments.model == "org/name"
    assert "configuration and tokenizer of org/name could not be brought here" in caplog.text
    assert "nowhere" in caplog.text


def test_a_full_disk_is_told_and_leaves_nothing_and_room_helps(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_checkpoint(model, rows=4)
    (model / "tokenizer.json").write_bytes(b" " * 3_000_000)
    with SmallDisk(tmp_path / "disk", "2m") as disk:
        arguments = Arguments(
            "org/name", download_dir=str(disk.folder), model_loader_extra_config={"model_uri": f"file://{model}"}
        )
        free_bytes = disk.free_bytes
        with caplog.at_level(logging.WARNING):
            config_and_tokenizer.prepare(arguments)
        (line,) = [record.getMessage() for record in caplog.records]
        assert "MX_DISK_FULL" in line
        assert str(disk.folder) in line
        assert "3000000 bytes are to be written" in line
        assert re.search(r"and \d+ are free", line)
        assert not [path for path in disk.folder.rglob("*") if path.is_file()]
        assert disk.free_bytes > free_bytes - 50_000

        disk.resize("16m")
        caplog.clear()
        config_and_tokenizer.prepare(arguments)
        assert not caplog.records
        found = {path.name: path.stat().st_size for path in disk.folder.rglob("snapshots/*/*") if path.is_file()}
        assert found["tokenizer.json"] == 3_000_000
        assert found["config.json"] == (model / "config.json").stat().st_size


@pytest.mark.parametrize("fault", [ValueError("odd"), RuntimeError("a library's own"), KeyError("x")])
def test_a_fault_of_ours_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr(config_and_tokenizer, "_prepare", broken)
    monkeypatch.setattr(config_and_tokenizer, "_to_hub_cache", broken)
    monkeypatch.setenv("MX_MODEL_URI", "s3://bucket/model")
    with caplog.at_level(logging.WARNING):
        config_and_tokenizer.prepare(Arguments("org/name"))
        config_and_tokenizer.prepare_offline("org/name", None)
    assert caplog.text.count("by a fault of ours") == 2
    assert str(fault.args[0]) in caplog.text


def small_model(folder: Path, model_type: str, *more: str) -> str:
    """A model's folder with just its small files; returns its URI."""
    for path in folder.glob("*"):
        path.unlink()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    for name in more:
        (folder / name).write_text(name)
    return f"file://{folder}"


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def snapshot(hub: Path) -> Path:
    repository = hub / "models--org--name"
    return repository / "snapshots" / (repository / "refs" / "main").read_text()


def test_new_weights_never_meet_an_old_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model that is replaced under MX_MODEL_URI (findings, row 36)."""
    hub, model = tmp_path / "hub", tmp_path / "model"
    monkeypatch.setenv("MX_MODEL_URI", small_model(model, "old", "chat_template.jinja"))
    config_and_tokenizer.prepare(Arguments("org/name", download_dir=str(tmp_path / "hub")))
    old = snapshot(hub)
    small_model(model, "new")
    config_and_tokenizer.prepare(Arguments("org/name", download_dir=str(tmp_path / "hub")))
    assert names_below(old) == {"config.json", "chat_template.jinja"}
    assert names_below(snapshot(hub)) == {"config.json"}
    assert "new" in (snapshot(hub) / "config.json").read_text()


def test_what_came_from_the_hub_keeps_its_name_and_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MX_MODEL_URI", small_model(tmp_path / "model", "new"))
    theirs = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text('{"model_type": "theirs"}')
    refs = theirs.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    arguments = Arguments("org/name", download_dir=str(tmp_path / "hub"))
    config_and_tokenizer.prepare(arguments)
    assert (refs / "main").read_text() == "a" * 40
    assert "new" in (Path(arguments.model) / "config.json").read_text()
    assert (arguments.tokenizer, arguments.served_model_name) == (arguments.model, ["org/name"])


def test_a_prefix_that_changed_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with spelt_store({"m/config.json": b'{"model_type": "old"}', "m/chat_template.jinja": b"x"}) as store:
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        first, second = Arguments("s3://bucket/m"), Arguments("s3://bucket/m")
        config_and_tokenizer.prepare(first)
        store.objects = {"m/config.json": b'{"model_type": "new"}'}
        config_and_tokenizer.prepare(second)
    assert names_below(Path(first.model)) == {"config.json", "chat_template.jinja"}
    assert names_below(Path(second.model)) == {"config.json"}


FORKING = """
import json, os, sys, threading, types
from vllm_plugin import configuration_process

arguments = types.SimpleNamespace(
    model=sys.argv[1], load_format="mx", tokenizer=None, revision=None, download_dir=None, served_model_name=None,
    model_loader_extra_config={},
)
configuration_process.prepare(arguments)
used = sorted({"obstore", "grpc", "nixl", "mxcore", "torch"} & sys.modules.keys())
child = os.fork()
if not child:
    from mxcore.storage.remote import ObjectFolder, parse_model_uri

    folder = ObjectFolder(parse_model_uri(sys.argv[1]))
    os._exit(0 if [file.path for file in folder.files] else 1)
print(json.dumps([vars(arguments), used, threading.active_count(), os.waitpid(child, 0)[1]]))
"""


def test_a_store_that_was_asked_before_vllm_forks_can_be_asked_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of clients with threads nothing was used in the process that vLLM forks (findings, A5: it hung for ever)."""
    with spelt_store({"m/config.json": b'{"model_type": "x"}', "m/model.safetensors": b"1234"}) as store:
        environ = {**os.environ, **store.environ(), "HF_HUB_CACHE": str(tmp_path / "hub")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FORKING, "s3://bucket/m"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    arguments, used, threads, status = json.loads(done.stdout.splitlines()[-1])
    assert Path(arguments["model"], "config.json").read_text() == '{"model_type": "x"}'
    assert arguments["served_model_name"] == ["s3://bucket/m"]
    assert arguments["model_loader_extra_config"] == {"model_uri": "s3://bucket/m"}
    assert (used, threads, status) == ([], 1, 0)


def test_a_process_that_fails_is_a_line_and_vllm_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    arguments = Arguments("s3://bucket/m")
    configuration_process.prepare(arguments)
    assert arguments == Arguments("s3://bucket/m")
    assert "configuration and tokenizer of s3://bucket/m could not be brought here" in caplog.text


@pytest.mark.parametrize(
    ("speculative", "draft"),
    [
        ({"method": "eagle", "model": "org/head", "revision": "r"}, {"model": "org/head", "revision": "r"}),
        ({"method": "mtp", "model": "org/name"}, None),
        ({"method": "ngram", "model": "ngram"}, None),
        ({"method": "mtp"}, None),
        (None, None),
    ],
)
def test_a_draft_of_its_own_is_brought_by_its_name(
    speculative: Any, draft: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever its model comes from: what vLLM was given of it stays."""
    asked: list[tuple[str, Any]] = []
    arguments = SimpleNamespace(**vars(Arguments("org/name")), speculative_config=speculative)
    monkeypatch.setenv("MX_MODEL_URI", str(tmp_path))
    monkeypatch.setattr(
        configuration_process, "_ask", lambda call, given: asked.append((call, given["draft"])) or given
    )
    configuration_process.prepare(arguments)
    assert (asked, arguments.speculative_config) == ([("prepare", draft)], speculative)

    brought: list[tuple[str, str]] = []

    def bring(settings: Any, model: str, *_: object) -> None:
        brought.append((model, settings.model_uri))

    monkeypatch.setattr(config_and_tokenizer, "_to_hub_cache", bring)
    config_and_tokenizer.prepare(SimpleNamespace(**vars(Arguments("org/name")), draft=draft))
    assert brought == [("org/name", str(tmp_path)), *([("org/head", "")] if draft else [])]


def test_what_is_here_starts_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configuration_process, "_ask", lambda *_: pytest.fail("nothing was to be asked"))
    configuration_process.prepare(Arguments(str(tmp_path), model_loader_extra_config={"server_address": "h:1"}))
    configuration_process.prepare(Arguments(None))
