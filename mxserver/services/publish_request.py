"""A publish request, of which the worker's metadata may have a hundred MiB: that stays the bytes that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from google.protobuf.descriptor import Descriptor

from mxserver.calls import split_off
from mxserver.store import small_part
from mxserver.wire.proto import record_pb2

_WORKER = record_pb2.PublishRequest.WORKER_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """What the server reads of a request, and the worker's metadata as it came."""

    DESCRIPTOR: ClassVar[Descriptor] = record_pb2.PublishRequest.DESCRIPTOR  # of the whole

    facts: record_pb2.PublishRequest
    worker: bytes

    @classmethod
    def parse(cls, data: bytes) -> PublishRequest:
        """At most three times the metadata are in memory at a time. Raises DecodeError."""
        rest, worker = split_off(data, _WORKER)
        del data
        facts = record_pb2.PublishRequest.FromString(rest)
        if worker is not None:
            facts.worker.SetInParent()
            facts.worker.MergeFromString(small_part(worker))
        return cls(facts, worker or b"")
