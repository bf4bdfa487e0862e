"""The source id of an identity."""

from __future__ import annotations

import hashlib

import pytest

from bench.micro.conftest import Measure
from mxserver.wire.calls import canonical_json, source_id
from mxserver.wire.proto import p2p_pb2

pytestmark = pytest.mark.benchmark(group="source id")

IDENTITY = p2p_pb2.SourceIdentity(
    mx_version="mx-2",
    model_name="meta-llama/Llama-3.1-405B-Instruct",
    dtype="bfloat16",
    tensor_parallel_size=8,
    extra_parameters={f"option_{n}": f"value-{n}" for n in range(40)},
)


def test_source_id(measure: Measure) -> None:
    assert len(measure(lambda: source_id(IDENTITY), times=1)) == 16


def test_limit_sha256(measure: Measure) -> None:
    """The hash alone, of the text that is made anyway."""
    text = canonical_json(IDENTITY).encode()
    measure(lambda: hashlib.sha256(text).hexdigest(), times=1)
