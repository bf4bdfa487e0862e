"""The collector of garbage stays off while a plan is made, and is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxcore.process import collection_paused
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import load


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.enable()


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(AssertionError, match="on within"), collection_paused():
        assert gc.isenabled(), "on within"
    assert gc.isenabled()


def test_one_that_was_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_a_load_of_many_tensors_starts_hardly_a_collection(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((3,), number, dtype=torch.int16) for number in range(5_000)}
    save_file(tensors, tmp_path / "model.safetensors")
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load(open_checkpoint(tmp_path), into)  # what is imported and made once
    checkpoint = open_checkpoint(tmp_path)
    gc.collect()
    before = sum(each["collections"] for each in gc.get_stats())

    load(checkpoint, into)

    collections = sum(each["collections"] for each in gc.get_stats()) - before
    assert collections <= 3, "5,000 tensors are 15,000 new tuples, twenty young generations"
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
