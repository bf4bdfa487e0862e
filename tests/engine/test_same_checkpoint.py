"""One checkpoint is one identity wherever it lies; files of the server's cache are offered as what was read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxbench.stand_ins.hub import hub_stand_in  # noqa: E402
from mxcore.engine import leave, load  # noqa: E402
from mxserver.wire.files import ModelClient  # noqa: E402
from tests.engine.plain_engine import PlainEngine, answer, write_checkpoint  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402
from tests.server.conftest import ServerProcess  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_"))]:
        monkeypatch.delenv(name)
    yield
    leave("the test ends")


def options(server: str, folder: Path, **more: Any) -> dict[str, Any]:
    report = str(folder / "report.json")
    return {"server_address": server, "worker_host": "127.0.0.1", "worker_grpc_port": 0, "report_path": report, **more}


def report_of(given: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(given["report_path"]).read_text())
    return told


def in_hub_layout(folder: Path, checkpoint: Path) -> Path:
    """The snapshot of org/name with these files, as links to blobs."""
    repository = folder / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_the_same_checkpoint_at_three_paths_is_one(server: str, tmp_path: Path) -> None:
    """MX_MODEL_NAME_OVERRIDE and MX_MODEL_REVISION: a folder, its copy, and the hub's cache with its own name."""
    first = write_checkpoint(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "second"))
    hub = in_hub_layout(tmp_path / "hub", first)
    named = options(server, tmp_path, model_name_override="org/name", model_revision=COMMIT)
    expected = answer(load(PlainEngine(first, named), ROLES["both"]))
    source = report_of(named)
    assert (source["path"], source["serving"]) == ("storage", True)
    for path, given in ((copy, named), (hub, options(server, tmp_path, model_revision=COMMIT))):
        assert answer(load(PlainEngine(path, given), ROLES["both"])) == expected
        told = report_of(given)
        assert (told["path"], told["source_id"], told["fallbacks"]) == ("p2p", source["source_id"], []), path
    leave("the first one's process is started again, from the copy")
    assert answer(load(PlainEngine(copy, named), ROLES["both"])) == expected
    assert (report_of(named)["path"], report_of(named)["source_id"]) == ("storage", source["source_id"])
    assert answer(load(PlainEngine(first, named), ROLES["both"])) == expected
    assert report_of(named)["path"] == "p2p"


def test_other_weights_under_the_same_name_are_others(server: str, tmp_path: Path) -> None:
    named = options(server, tmp_path, model_name_override="org/another", load_paths=["p2p", "engine"])
    answers = set()
    for seed in (1, 2):
        path = write_checkpoint(tmp_path / f"seed-{seed}", seed=seed)
        answers.add(answer(load(PlainEngine(path, named), ROLES["both"])))
        assert report_of(named)["path"] == "storage"
    assert len(answers) == 2


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server whose cache has the model, and the snapshot's folder, which its workers see."""
    files = {path.name: path.read_bytes() for path in write_checkpoint(tmp_path / "origin").iterdir()}
    with hub_stand_in() as hub:
        hub.add("org/plain", {**files, "config.json": b"{}"})
        environ = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_OFFLINE": "0",
            "MODEL_EXPRESS_CACHE_DIRECTORY": str(tmp_path / "cache"),
            "MX_METADATA_BACKEND": "memory",
        }
        running = ServerProcess("--port", "0", environ=environ)
        with ModelClient(running.address) as client:
            client.ensure("org/plain")
    (snapshot,) = (tmp_path / "cache" / "models--org--plain" / "snapshots").iterdir()
    yield running.address, snapshot
    running.close()


def test_files_of_the_servers_cache_that_change_while_they_are_read_are_not_offered(
    cached: tuple[str, Path], tmp_path: Path
) -> None:
    address, snapshot = cached
    given = options(address, tmp_path, load_paths=["cache"])

    class Replaced(PlainEngine):
        replaces = False

        def fill(self, *args: Any) -> int:
            read = super().fill(*args)
            if self.replaces:
                write_checkpoint(snapshot, seed=7)
            return read

    engine = Replaced(Path("org/plain"), given)
    expected = answer(load(engine, ROLES["both"]))
    told = report_of(given)
    assert (told["path"], told["serving"], told["fallbacks"]) == ("cache", True, [])
    leave("the next one")
    engine.replaces = True
    assert answer(load(engine, ROLES["both"])) == expected
    told = report_of(given)
    assert (told["path"], told["serving"]) == ("cache", False)
    assert told["fallbacks"] == ["the weight files of org/plain changed while they were read: not offered"]
    assert told["refusals"] == {"offer": {"file_changed": 1}}
