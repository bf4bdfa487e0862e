"""Numbers that an engine made from weights and keeps outside of tensors: their canonical form and its digest."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

from mxserver.wire.proto import mx_pb2

__all__ = ["scalars_digest", "scalars_from_proto", "scalars_to_proto"]


def scalars_digest(scalars: Mapping[str, float]) -> str:
    """SHA-256 (lower hex) over the scalars sorted by name: UTF-8 name, a zero byte, little-endian IEEE double."""
    state = hashlib.sha256()
    for name in sorted(scalars):
        state.update(name.encode() + b"\0" + struct.pack("<d", scalars[name]))
    return state.hexdigest()


def scalars_to_proto(scalars: Mapping[str, float]) -> list[mx_pb2.Scalar]:
    """The form that travels, sorted by name."""
    return [mx_pb2.Scalar(name=name, value=scalars[name]) for name in sorted(scalars)]


def scalars_from_proto(messages: Iterable[mx_pb2.Scalar]) -> dict[str, float]:
    """What another worker sent; if a name comes twice, the digest does not match."""
    return {message.name: message.value for message in messages}
