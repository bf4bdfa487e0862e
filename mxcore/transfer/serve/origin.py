"""Who made the digests that a worker serves, and so vouches for the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mxcore.transfer.layout import Layout
from mxserver.wire.proto import mx_pb2

__all__ = ["Origin"]

_NAMED_WORKERS = 8


@dataclass(frozen=True)
class Origin:
    """As the holder tells it and its record shows it. `received_from`: workers, those that gave most first."""

    kind: mx_pb2.DigestOrigin.ValueType
    received_from: tuple[str, ...] = ()

    @classmethod
    def own(cls, layout: Layout) -> Origin:
        """Of weights that this worker read from storage, and processed where the layout says so."""
        is_raw = layout.kind == "raw"
        return cls(mx_pb2.DIGEST_ORIGIN_READ if is_raw else mx_pb2.DIGEST_ORIGIN_PROCESSED)

    @classmethod
    def received(cls, bytes_from: Mapping[str, int]) -> Origin:
        """Of weights that came from these workers, with their digests."""
        return cls(mx_pb2.DIGEST_ORIGIN_RECEIVED, _most(bytes_from))

    @classmethod
    def received_raw(cls, bytes_from: Mapping[str, int]) -> Origin:
        """Of weights that came raw from these workers, and were processed here."""
        return cls(mx_pb2.DIGEST_ORIGIN_RECEIVED_RAW, _most(bytes_from))


def _most(bytes_from: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(bytes_from, key=lambda worker: (-bytes_from[worker], worker))[:_NAMED_WORKERS])
