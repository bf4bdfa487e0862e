"""What a manifest says beside tensors: numbers, and names that say something by themselves."""

from __future__ import annotations

import math

from mxcore.transfer.layout import Scalars, scalars_digest, scalars_from_proto, scalars_to_proto
from mxserver.wire.proto import mx_pb2


def sent(scalars: Scalars) -> dict[str, float | None]:
    messages = [message.SerializeToString() for message in scalars_to_proto(scalars)]
    return scalars_from_proto(map(mx_pb2.Scalar.FromString, messages))


def test_a_name_without_a_number_is_not_the_number_nought() -> None:
    said = {"scale": 0.5, "gain": 0.0, "kernel is a Kernel": None, "large": math.inf}
    assert sent(said) == said
    assert scalars_digest({"gain": 0.0}) != scalars_digest({"gain": None})
    assert scalars_digest({"gain": 0.0}) != scalars_digest({"gain": -0.0})
