"""In what two identities differ, in an operator's words."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from mxserver.wire.proto import p2p_pb2

__all__ = ["differences"]

_WORDS = {
    "mx_version": "another protocol",
    "checkpoint": "other weight files",
    "config": "another configuration of the model (config.json or overrides)",
    "engine": "other options or variables that choose kernels",
    "experts": "experts spread otherwise",
}
"""Of fields whose values are digests, or mean nothing to a reader."""


def differences(theirs: p2p_pb2.SourceIdentity, ours: p2p_pb2.SourceIdentity) -> list[str]:
    """What "they have", one text for each field that is not equal; empty if all are."""
    there, here = _fields(theirs), _fields(ours)
    unequal = [name for name in sorted(there.keys() | here.keys()) if there.get(name, "") != here.get(name, "")]
    return [_WORDS.get(name, f"{name} {there.get(name, 'unset')} (here {here.get(name, 'unset')})") for name in unequal]


def _fields(identity: p2p_pb2.SourceIdentity) -> dict[str, Any]:
    fields = MessageToDict(identity, preserving_proto_field_name=True)
    return {**fields.pop("extra_parameters", {}), **fields}
