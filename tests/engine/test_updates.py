"""Updates of a model that runs, by the smallest engine: all or nothing, and what the old version wrote is gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mxcore.engine import (
    Role,
    Running,
    find_checkpoint,
    has_version,
    load_running,
    running_of,
    update,
)
from mxcore.engine.weights import constructed
from mxcore.errors import UpdateFailed
from tests.engine.plain_engine import answer
from tests.engine.scaled_engine import ONE_MORE, SIZE, ScaledEngine, fresh, scaled
from tests.storage.signed.signing import Key

BOTH = Role("mx", pulls=True, reads_storage=True, offers=True)
PATHS = ("p2p", "engine")


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, Path]:
    """The first one has a scale."""
    return scaled(tmp_path / "one", 1, 0.5), scaled(tmp_path / "two", 2, None)


def started(folder: Path, options: Mapping[str, Any] | None = None) -> Running:
    load_running(ScaledEngine(folder, options=options), BOTH)
    running = running_of("plain")
    assert running is not None
    return running


def to(
    running: Running,
    new: Path,
    old: Path,
    breaks: list[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> bool:
    return update(
        running,
        str(new),
        lambda replacement: ScaledEngine(new, replacement, breaks, options),
        lambda replacement: ScaledEngine(old, replacement, breaks, options),
        paths=PATHS,
    ).changed


def test_what_the_old_version_wrote_and_the_new_one_leaves_is_the_constructors(versions: tuple[Path, Path]) -> None:
    one, two = versions
    running = started(one)
    tensors = {name: tensor.data_ptr() for name, tensor in running.model.state_dict().items()}
    layer = running.model[1]
    assert layer._scale_float == float(layer.limit) == float(layer.cap) == 0.5
    for new, old in ((two, one), (one, two), (two, one)):
        assert to(running, new, old)
        assert answer(running.model, SIZE) == fresh(new)
        assert running.state()["version"] == str(new)
        assert {name: tensor.data_ptr() for name, tensor in running.model.state_dict().items()} == tensors
    assert layer._scale_float == float(layer.limit) == float(layer.cap) == float(layer.scale) == 1.0
    assert (float(layer.requests), layer.last_float) == (3, 4.0)  # what requests wrote stays


def test_a_version_that_processing_makes_one_more_tensor_of_is_refused(tmp_path: Path) -> None:
    """What the running model has no place for would be left out in silence."""
    one, two = scaled(tmp_path / "one", 1, None), scaled(tmp_path / "two", 2, ONE_MORE)
    running = started(one)
    with pytest.raises(UpdateFailed, match=r"Scaled would have \['offset'\] with the new weights"):
        to(running, two, one)
    assert answer(running.model, SIZE) == fresh(one)
    assert running.state()["version"] == str(one)


def test_a_model_whose_constructor_values_much_keeps_no_copy_of_it(
    versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads, and is refused when it is to be updated."""
    monkeypatch.setattr(constructed, "MOST_VALUES_BYTES", 7)  # two of its values of four bytes
    one, two = versions
    running = started(one)
    assert running.constructed is None
    assert answer(running.model, SIZE) == fresh(one)
    with pytest.raises(UpdateFailed, match="how this model was built is not known"):
        to(running, two, one)
    assert running.is_whole


def test_equal_weights_move_nothing(versions: tuple[Path, Path]) -> None:
    running = started(versions[0])
    running.checkpoint = find_checkpoint(str(versions[0])).digest()
    assert not to(running, versions[0], versions[0], breaks=[1])


def test_before_the_first_byte_the_old_version_is_untouched(versions: tuple[Path, Path]) -> None:
    one, two = versions
    running = started(one)
    (two / "model-1.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UpdateFailed):
        to(running, two, one)
    assert running.is_whole
    assert answer(running.model, SIZE) == fresh(one)


def test_after_it_the_old_version_is_loaded_again(versions: tuple[Path, Path]) -> None:
    one, two = versions
    running = started(one)
    with pytest.raises(UpdateFailed, match="is again"):
        to(running, two, one, breaks=[1])
    assert running.is_whole
    assert answer(running.model, SIZE) == fresh(one)
    assert to(running, two, one)
    assert answer(running.model, SIZE) == fresh(two)


def test_what_cannot_be_mended_is_not_whole_until_an_update_succeeds(versions: tuple[Path, Path]) -> None:
    one, two = versions
    running = started(one)
    with pytest.raises(UpdateFailed, match="must not answer"):
        to(running, two, one, breaks=[2])
    assert not running.state()["ready"]
    assert to(running, two, one)
    assert running.is_whole
    assert answer(running.model, SIZE) == fresh(two)


def test_a_version_that_lacks_a_tensor_is_refused(versions: tuple[Path, Path]) -> None:
    one, two = versions
    running = started(one)
    first = two / "model-1.safetensors"
    save_file({name: tensor for name, tensor in load_file(first).items() if name != "2.weight"}, first)
    with pytest.raises(UpdateFailed, match=r"no values for 1 tensors .*2\.weight"):
        to(running, two, one)
    assert answer(running.model, SIZE) == fresh(one)


def test_what_it_has_is_known_while_it_runs_and_what_it_cannot_take(versions: tuple[Path, Path]) -> None:
    """Nothing changes but the name; a model that is not whole has no version."""
    one, two = versions
    running = started(one)
    running.checkpoint = find_checkpoint(str(one)).digest()
    assert not has_version(running, "second", lambda replacement: ScaledEngine(two, replacement))
    assert running.version == str(one)
    assert has_version(running, "first", lambda replacement: ScaledEngine(one, replacement))
    assert running.version == "first"
    running.is_whole = False
    assert not has_version(running, "again", lambda replacement: ScaledEngine(one, replacement))
    (two / "model-1.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UpdateFailed, match="first stays"):
        has_version(running, "broken", lambda replacement: ScaledEngine(two, replacement))


def test_a_version_that_has_to_be_signed_and_is_not_is_refused(versions: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = versions
    key = Key(tmp_path / "keys")
    for folder in versions:
        (folder / "config.json").write_text("{}")
    key.sign(one)
    options = {"model_signature": "require", "model_signature_key": str(key.public)}
    running = started(one, options)
    with pytest.raises(UpdateFailed, match="MX_SIGN"):
        to(running, two, one, options=options)
    assert running.is_whole
    assert answer(running.model, SIZE) == fresh(one)
    key.sign(two)
    assert to(running, two, one, options=options)
    assert answer(running.model, SIZE) == fresh(two)
