"""Published versions as updates of a model that runs, by the smallest engine and a real server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mxcore import publish
from mxcore.engine import Replacement, Running, forget, leave, restore, update
from mxcore.errors import UpdateFailed
from mxcore.exchange import PublishedVersion
from mxcore.settings import load_settings
from tests.engine.plain_engine import answer
from tests.engine.test_updates import SIZE, ScaledEngine, fresh, scaled, started
from tests.storage.signed.signing import Key

Options = Mapping[str, Any]


class TrainedEngine(ScaledEngine):
    """Whose weights are those of a published version."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        replacement: Replacement,
        options: Options,
        breaks: list[int] | None = None,
    ) -> None:
        super().__init__(folder, replacement, breaks, options)
        self.published = PublishedVersion.named(uri, load_settings(options))

    def wanted_digest(self) -> str:
        if self.published is None:
            return super().wanted_digest()
        return (self.replacement.checkpoint if self.replacement else "") or self.published.digest


@pytest.fixture
def options(server: str) -> Iterator[Options]:
    yield {"server_address": server, "worker_host": "127.0.0.1", "transport": "tcp", "drain_timeout_seconds": 5}
    forget("plain")
    leave("the test ends", "plain")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return scaled(tmp_path / "one", 1, None), scaled(tmp_path / "two", 2, None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def to(running: Running, uri: str, old: str, options: Options, *, breaks: list[int] | None = None, **more: Any) -> bool:
    folder = Path(running.engine.model)
    return update(
        running,
        uri,
        lambda replacement: TrainedEngine(folder, uri, replacement, options, breaks),
        lambda replacement: TrainedEngine(folder, old, replacement, options, breaks),
        paths=("p2p", "engine"),
        **more,
    ).changed


def test_a_published_version_is_taken_and_the_next_one_in_part(folders: tuple[Path, Path], options: Options) -> None:
    running = started(folders[0], options)
    two = tensors(folders[1])
    with publish("plain", two, 1, server=options["server_address"], settings=options) as first:
        assert to(running, first.uri, "", options)
        assert not to(running, first.uri, "", options)
    assert answer(running.model, SIZE) == fresh(folders[1])
    assert running.report["bytes"] == sum(tensor.nbytes for tensor in two.values())
    two["1.weight"] = two["1.weight"] * 2
    with publish("plain", two, 2, server=options["server_address"], settings=options) as second:
        with pytest.raises(UpdateFailed, match="is again"):  # and the first version has no publisher any more
            to(running, second.uri, first.uri, options, breaks=[1])
        assert (running.version, answer(running.model, SIZE)) == (first.uri, fresh(folders[1]))
        assert to(running, second.uri, first.uri, options)
    assert torch.equal(running.model[1].weight, two["1.weight"])
    assert to(running, second.uri, first.uri, options, anew=True, checkpoint=running.checkpoint)
    assert running.report["bytes"] == 0  # it is held
    running.model[1].weight.data.zero_()
    running.drop()
    restore(running, lambda replacement: TrainedEngine(folders[0], second.uri, replacement, options))
    assert running.is_whole
    assert torch.equal(running.model[1].weight, two["1.weight"])
    assert to(running, "", second.uri, options)
    assert running.published is None
    assert answer(running.model, SIZE) == fresh(folders[0])


def test_nothing_of_a_version_that_nobody_has_is_taken(folders: tuple[Path, Path], options: Options) -> None:
    running = started(folders[0], options)
    with pytest.raises(UpdateFailed, match="nobody has version 9 of 'nothing'"):
        to(running, "mx://nothing/9", "", options)
    assert running.is_whole
    assert answer(running.model, SIZE) == fresh(folders[0])


def test_where_weights_have_to_be_signed_published_ones_are_refused(
    folders: tuple[Path, Path], options: Options, tmp_path: Path
) -> None:
    key = Key(tmp_path / "keys")
    (folders[0] / "config.json").write_text("{}")
    key.sign(folders[0])
    options = {**options, "model_signature": "require", "model_signature_key": str(key.public)}
    running = started(folders[0], options)
    with (
        publish("signed", tensors(folders[1]), 1, server=options["server_address"]) as published,
        pytest.raises(UpdateFailed, match="published and not signed"),
    ):
        to(running, published.uri, "", options)
    assert answer(running.model, SIZE) == fresh(folders[0])
