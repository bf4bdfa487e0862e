"""What an engine says of its weights beside tensors, numbers and names without one: the canonical form, its digest."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from mxserver.wire.proto import mx_pb2

__all__ = ["Scalars", "scalars_digest", "scalars_from_proto", "scalars_to_proto"]

Scalars: TypeAlias = Mapping[str, float | None]
"""By name: numbers that were made from weights; None where the name itself says how they are made (the structure)."""


def scalars_digest(scalars: Scalars) -> str:
    """SHA-256 (lower hex) over the scalars sorted by name.

    Of each: the UTF-8 name, then a zero byte and a little-endian IEEE double, or a byte of 1 where there is no number.
    """
    state = hashlib.sha256()
    for name in sorted(scalars):
        value = scalars[name]
        state.update(name.encode() + (b"\1" if value is None else b"\0" + struct.pack("<d", value)))
    return state.hexdigest()


def scalars_to_proto(scalars: Scalars) -> list[mx_pb2.Scalar]:
    """The form that travels, sorted by name."""
    return [mx_pb2.Scalar(name=name, value=scalars[name]) for name in sorted(scalars)]


def scalars_from_proto(messages: Iterable[mx_pb2.Scalar]) -> dict[str, float | None]:
    """What another worker sent; if a name comes twice, the digest does not match."""
    return {message.name: message.value if message.HasField("value") else None for message in messages}
