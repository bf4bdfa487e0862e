"""mxcore's checkpoints of an object store: a real S3 server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mxbench.stand_ins.s3_server import S3Server
from mxcore import Want, load, load_file, open_checkpoint, stream
from mxcore.errors import ObjectMissing, SignatureError
from mxcore.storage.access import RemoteCheckpoint
from tests.object_store.conftest import URI

Made = tuple[Path, dict[str, np.ndarray]]


def test_a_store_is_read_as_a_folder_is(s3: S3Server, made: Made) -> None:
    tensors = made[1]
    with open_checkpoint(URI) as checkpoint:
        assert isinstance(checkpoint, RemoteCheckpoint)
        assert sorted(checkpoint) == sorted(tensors)
        whole = {name: np.zeros_like(array) for name, array in tensors.items()}
        part = np.zeros((700, 100), np.float32)
        report = load(
            checkpoint, [*map(Want, whole, whole.values()), Want("layers.1.weight", part, ((0, 700), (9, 109)))]
        )
        assert report.bytes_by_way == {"object": report.wanted_bytes}
        streamed = {name: array.copy() for name, array in stream(checkpoint, framework="numpy")}
    loaded = load_file(URI, framework="numpy")
    for name, array in tensors.items():
        for found in (whole[name], streamed[name], loaded[name]):
            np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(part, tensors["layers.1.weight"][:, 9:109])
    assert [name for name, _ in stream(URI, ["layers.2.bias"], framework="numpy")] == ["layers.2.bias"]


def test_torch_takes_it_too(s3: S3Server, made: Made) -> None:
    torch = pytest.importorskip("torch", reason="it is what makes these tensors")
    found = load_file(URI)
    assert {name: type(tensor) for name, tensor in found.items()} == dict.fromkeys(made[1], torch.Tensor)
    np.testing.assert_array_equal(found["layers.3.weight"].numpy(), made[1]["layers.3.weight"])


def test_nothing_there_is_said(s3: S3Server) -> None:
    with pytest.raises(ObjectMissing, match="team/nothing"):
        open_checkpoint("s3://models/team/nothing")


@pytest.mark.parametrize("word", ["require", "requre"])
def test_nothing_is_opened_unverified_where_signatures_are_required(
    s3: S3Server, made: Made, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Neither from a store nor from a folder: engines' loads alone verify them."""
    checkpoint = open_checkpoint(URI)
    monkeypatch.setenv("MX_MODEL_SIGNATURE", word)
    folder = made[0] / "models" / URI.removeprefix("s3://models/")
    for place in (URI, str(folder), folder):
        for opens in (open_checkpoint, load_file, lambda place: load(place, {}), lambda place: list(stream(place))):
            with pytest.raises(SignatureError, match="is not opened: MX_MODEL_SIGNATURE requires"):
                opens(place)
    monkeypatch.setenv("MX_MODEL_SIGNATURE", " OFF ")
    assert list(open_checkpoint(folder)) == list(checkpoint)
