"""Which rows of a destination are read when only some of its bytes are missing, and that nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is the engine's")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is the engine's")

from mxcore.engine import lazy_weights  # noqa: E402
from mxcore.engine.rungs.missing_chunks import MissingBytes  # noqa: E402
from mxcore.storage.checkpoint import open_checkpoint  # noqa: E402


def touched(to: torch.Tensor, stretches: list[tuple[int, int]]) -> set[int]:
    """The rows with a byte between the first and the last of theirs that is missing, found byte by byte."""
    rows = set()
    for row in range(to.shape[0]):
        inner = sum((size - 1) * step for size, step in zip(to.shape[1:], to.stride()[1:], strict=True))
        begin = to.data_ptr() + row * to.stride(0) * to.element_size()
        end = begin + (inner + 1) * to.element_size()
        if any(first < end and last > begin for first, last in stretches):
            rows.add(row)
    return rows


def expanded(ranges: list[tuple[int, int]]) -> list[int]:
    return [row for first, end in ranges for row in range(first, end)]


@pytest.mark.parametrize("made", ["plain", "narrowed", "transposed", "columns", "vector"])
@given(st.lists(st.integers(0, 700), min_size=0, max_size=8, unique=True).map(sorted))
def test_the_rows_that_touch_what_is_missing(made: str, cuts: list[int]) -> None:
    whole = torch.zeros(12, 20, dtype=torch.int16)
    to = {
        "plain": whole,
        "narrowed": whole[3:9],
        "transposed": whole.t(),
        "columns": whole[:, 4:9],
        "vector": whole.view(-1)[5:200],
    }[made]
    base = whole.data_ptr() - 50
    stretches = [(base + begin, base + end) for begin, end in zip(cuts[::2], cuts[1::2], strict=False)]
    found = MissingBytes(stretches).rows(to)
    assert expanded(found) == sorted(set(expanded(found)))  # apart and ascending
    assert set(expanded(found)) == touched(to, stretches)


def test_a_scalar_and_nothing() -> None:
    one = torch.zeros((), dtype=torch.float32)
    address = one.data_ptr()
    assert MissingBytes([(address + 3, address + 4)]).rows(one) == [(0, 1)]
    assert MissingBytes([(address + 4, address + 8)]).rows(one) == []
    assert MissingBytes([(address, address + 4)]).rows(torch.zeros(0, 3)) == []
    assert MissingBytes([]).rows(one) == []


def test_only_what_is_missing_is_read(tmp_path: Path) -> None:
    """Copies as weight loaders make them: whole, a rank's rows, into a fused parameter, transposed."""
    generator = torch.Generator().manual_seed(4)
    tensors = {name: torch.rand(400, 256, generator=generator) for name in ("a", "b", "c", "d")}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    memory = np.zeros(4 * 400 * 256, np.float32)
    flat = torch.from_numpy(memory)
    whole, fused, turned = flat[:102_400].view(400, 256), flat[102_400:307_200].view(800, 256), flat[307_200:]
    expected = {"a": tensors["a"], "b": tensors["b"], "c": tensors["c"], "d": tensors["d"].t()}
    places = {"a": whole, "b": fused[:400], "c": fused[400:], "d": turned.view(256, 400)}
    for name, place in places.items():
        place.copy_(expected[name])
    base = flat.data_ptr()
    stretches = [(base + 1000, base + 9000), (base + 102_400 * 4 - 10, base + 102_400 * 4 + 10)]
    for begin, end in stretches:
        memory.view(np.uint8)[begin - base : end - base] = 7
    reads: list[int] = []
    checkpoint = open_checkpoint([tmp_path / "model.safetensors"])
    missing = MissingBytes(stretches)
    for name, tensor in lazy_weights(
        checkpoint, mode="buffered", lazy_least_bytes=0, needed=missing.rows, read=reads.append
    ):
        places[name].copy_(tensor.t() if name == "d" else tensor)
    for name, place in places.items():
        assert torch.equal(place, expected[name]), name
    transposed_bytes = tensors["d"].nbytes  # no plain copy: read as a whole, and right
    assert sum(reads) == transposed_bytes + 1024 * ((9000 // 1024 + 1) + 1 + 1)


def test_without_a_limit_everything_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000, dtype=torch.int32)}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    reads: list[int] = []
    to = torch.zeros(1000, dtype=torch.int32)
    checkpoint = open_checkpoint([tmp_path / "model.safetensors"])
    for _, tensor in lazy_weights(checkpoint, mode="buffered", lazy_least_bytes=0, read=reads.append):
        to.copy_(tensor)
    assert torch.equal(to, tensors["a"])
    assert sum(reads) == 4000
