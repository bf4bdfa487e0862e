"""A branch that moves between two requests: configuration and weights are of the commit that was named first."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mxbench.stand_ins.hub import HubStandIn
from mxcore.engine.rungs.server_cache import CacheRung
from mxserver.wire.files import ModelClient
from tests.models.conftest import FILES, REPOSITORY, StartServer, digest_of, digests_of, files_below
from vllm_plugin import config_and_tokenizer

LATER = {path: data + b" " for path, data in FILES.items()}


def move_after(method: str, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a method of the client is answered; then main is another commit, which the server has too."""
    asked, ensure = getattr(ModelClient, method), ModelClient.ensure

    def call(self: ModelClient, name: str, **arguments: Any) -> Any:
        monkeypatch.undo()
        answer = asked(self, name, **arguments)
        hub.add(REPOSITORY, LATER)
        ensure(self, name)
        return answer

    monkeypatch.setattr(ModelClient, method, call)


def main_of(cache: Path) -> str:
    return (cache / "models--org--tiny-1.0" / "refs" / "main").read_text()


def test_configuration_is_of_the_commit_that_was_ensured(
    start_server: StartServer, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = SimpleNamespace(model_uri="", no_shared_storage=True, server_address=start_server().address)
    move_after("ensure", hub, monkeypatch)
    config_and_tokenizer._to_hub_cache(settings, REPOSITORY, None, str(tmp_path / "here"))
    (snapshot,) = (tmp_path / "here" / "models--org--tiny-1.0" / "snapshots").iterdir()
    assert digest_of((snapshot / "config.json").read_bytes()) == digest_of(FILES["config.json"])
    assert main_of(tmp_path / "here") == snapshot.name


@pytest.mark.parametrize("is_cached", [False, True])
def test_weights_are_of_the_commit_that_the_rung_began_with(
    start_server: StartServer, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    address = start_server().address
    if is_cached:
        with ModelClient(address) as client:
            client.ensure(REPOSITORY)
    engine = SimpleNamespace(model=REPOSITORY, revision=None, download_dir=str(tmp_path / "here"))
    settings = SimpleNamespace(no_shared_storage=True, server_address=address, model_revision=None, cache_weights=True)
    with ExitStack() as at_end:
        context: Any = SimpleNamespace(engine=engine, settings=settings, at_end=at_end, fallbacks=[])
        rung = CacheRung(context)
        move_after("list_files" if is_cached else "ensure", hub, monkeypatch)
        rung.poll()
        stored: Any = rung._stored(lambda *_: None)
    folder = stored.source.folder
    assert files_below(folder) == digests_of(FILES)
    assert main_of(tmp_path / "here") == folder.name
