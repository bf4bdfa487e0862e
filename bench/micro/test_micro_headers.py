"""The header of a checkpoint of 20,000 tensors: scanned, and made into tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro.conftest import Measure
from mxcore.safetensors.header import parse_header
from mxcore.storage.load import load_file

TENSORS = 20_000
TENSOR_BYTES = 64

pytestmark = pytest.mark.benchmark(group="header of 20,000 tensors")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = {
        f"model.layers.{n // 100}.mlp.experts.{n % 100}.weight": {
            "dtype": "BF16",
            "shape": [4, TENSOR_BYTES // 8],
            "data_offsets": [n * TENSOR_BYTES, (n + 1) * TENSOR_BYTES],
        }
        for n in range(TENSORS)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(TENSORS * TENSOR_BYTES))
    return path


def test_limit_json(measure: Measure, file: Path) -> None:
    """The standard library's parser, which checks nothing of what safetensors asks for."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert len(measure(lambda: json.loads(data[8 : 8 + length]), times=TENSORS)) == TENSORS


def test_scan(measure: Measure, file: Path) -> None:
    data = file.read_bytes()
    assert len(measure(lambda: parse_header(data, len(data)), times=TENSORS)) == TENSORS


def test_header_to_tensors(measure: Measure, file: Path) -> None:
    """From the file to a dict of torch tensors."""
    assert len(measure(lambda: load_file(file, framework="torch"), times=TENSORS)) == TENSORS


def test_limit_safetensors(measure: Measure, file: Path) -> None:
    """The same by the safetensors package."""
    from safetensors.torch import load_file as load_by_safetensors

    assert len(measure(lambda: load_by_safetensors(file), times=TENSORS)) == TENSORS
