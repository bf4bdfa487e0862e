"""Processed weights into the memory of a model that runs, by the smallest engine; both workers are in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mxbench.demo.processes import files_away
from mxcore.engine import Role, Running, forget, leave, load_running, running_of, update
from mxcore.errors import FenceFailed, UpdateFailed
from mxcore.transfer.receive.receiver import Receiver
from mxcore.transfer.serve import SelfCheck
from tests.engine.plain_engine import answer
from tests.engine.scaled_engine import SIZE, ScaledEngine, fresh, scaled

BOTH = Role("mx", pulls=True, reads_storage=True, offers=True)
PATHS = ("p2p", "engine")


class Pair:
    """Two engines of one process, `source` and `target`, with the first version."""

    def __init__(self, server: str, one: Path, two: Path) -> None:
        self.options = {"server_address": server, "worker_host": "127.0.0.1", "worker_grpc_port": 0}
        self.one, self.two = one, two
        self.source, self.target = self._started("source"), self._started("target")

    def _engine(self, name: str, folder: Path, replacement: Any = None) -> ScaledEngine:
        return ScaledEngine(folder, replacement, options=self.options, instance=name, processed_weights_move=True)

    def _started(self, name: str) -> Running:
        load_running(self._engine(name, self.one), BOTH)
        running = running_of(name)
        assert running is not None
        assert running.report["serving"]
        return running

    def to(self, running: Running, new: Path, checkpoint: str = "") -> dict[str, Any]:
        """Gives an engine a version; the report. `checkpoint`: where its files are not here."""

        def engine(replacement: Any) -> ScaledEngine:
            replacement.checkpoint = checkpoint
            return self._engine(running.engine.instance, new, replacement)

        old = running.engine
        return update(
            running,
            str(new),
            engine,
            lambda replacement: self._engine(old.instance, Path(old.model), replacement),
            paths=PATHS,
        ).report


@pytest.fixture
def pair(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """The first version has a scale. Nobody looks at its own memory."""
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)
    yield Pair(server, scaled(tmp_path / "one", 1, 0.5), scaled(tmp_path / "two", 2, None))
    leave("the test ends")
    for name in ("source", "target"):
        forget(name)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def places(running: Running) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in running.model.state_dict().items()}


def numbers(running: Running) -> list[float]:
    layer: Any = running.model[1]
    return [layer._scale_float, float(layer.limit), float(layer.cap), float(layer.scale)]


def test_there_and_back(pair: Pair) -> None:
    """What the old version wrote and the new one leaves alone is the constructor's; what requests wrote stays."""
    before = places(pair.target)
    layer: Any = pair.target.model[1]
    assert pair.target.report["path"] == "p2p"
    for turn, model in enumerate((pair.two, pair.one, pair.two), 1):
        answer(pair.target.model, SIZE)  # the source has not run yet, the first time
        cache, hidden = layer.cache.clone(), layer.hidden.clone()
        told = pair.to(pair.source, model)
        assert (told["path"], told["layout"], told["serving"]) == ("storage", "processed", True)
        with files_away(files_of(model)):
            received = pair.to(pair.target, model, pair.source.checkpoint)
        assert (received["path"], received["layout"], received["fallbacks"]) == ("p2p", "processed", [])
        assert received["bytes"] == told["bytes"] < 3 * 4 * SIZE * (SIZE + 1)
        assert torch.equal(layer.cache, cache)
        assert torch.equal(layer.hidden, hidden)
        assert (float(layer.requests), layer.last_float) == (turn, turn + 1.0)
        assert answer(pair.target.model, SIZE) == answer(pair.source.model, SIZE) == fresh(model)
        layer.requests -= 1  # of the line above: each turn counts one
        layer.last_float = turn + 1.0
        assert numbers(pair.target) == [0.5 if model == pair.one else 1.0] * 4
        assert places(pair.target) == before


def corrupt(running: Running) -> None:
    """One bit of its second layer is not what the digest of its offer promises."""
    weight: Any = running.model[1].weight
    weight.view(torch.uint8).view(-1)[:1].bitwise_xor_(1)


def test_a_transfer_that_fails_half_way_ends_with_storage(pair: Pair) -> None:
    pair.to(pair.source, pair.two)
    corrupt(pair.source)
    told = pair.to(pair.target, pair.two)
    assert told["path"] == "storage"
    assert "MX_DIGEST_MISMATCH" in told["fallbacks"][0]
    assert answer(pair.target.model, SIZE) == fresh(pair.two)
    assert numbers(pair.target) == [1.0] * 4


def test_and_where_nothing_else_has_the_version_with_the_old_one(pair: Pair) -> None:
    pair.to(pair.source, pair.two)
    corrupt(pair.source)
    with files_away(files_of(pair.two)), pytest.raises(UpdateFailed, match=r"one is again"):
        pair.to(pair.target, pair.two, pair.source.checkpoint)
    assert pair.target.is_whole
    assert (pair.target.version, pair.target.report["path"]) == (str(pair.one), "storage")
    assert answer(pair.target.model, SIZE) == fresh(pair.one)
    assert numbers(pair.target) == [0.5] * 4
    with files_away(files_of(pair.one)), files_away(files_of(pair.two)), pytest.raises(UpdateFailed, match="must not"):
        pair.to(pair.target, pair.two, pair.source.checkpoint)
    assert not pair.target.state()["ready"]


def test_equal_weights_move_nothing(pair: Pair, tmp_path: Path) -> None:
    """Under another name, too: a digest tells which they are. The offer stays what it was."""
    same = scaled(tmp_path / "same", 1, 0.5)
    offer = pair.target.report["worker_id"]
    assert pair.to(pair.target, same) == {}
    assert (pair.target.version, pair.target.report["worker_id"]) == (str(same), offer)
    assert answer(pair.target.model, SIZE) == fresh(same)


def test_memory_that_may_still_be_written_to_is_never_answered_from_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is in it: no other place mends that, nor does the next update. Only a restart helps."""

    def fails(receiver: Receiver, *arguments: Any) -> None:
        raise FenceFailed("as if an agent had not been destroyed")

    pair.to(pair.source, pair.two)
    with monkeypatch.context() as patched:
        patched.setattr(Receiver, "_receive", fails)
        with pytest.raises(UpdateFailed, match="restart this engine"):
            pair.to(pair.target, pair.two)
    assert not pair.target.state()["ready"]
    with pytest.raises(UpdateFailed, match="restart this engine"):
        pair.to(pair.target, pair.one)
    assert not pair.target.state()["ready"]
