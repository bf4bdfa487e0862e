"""The source id: what an identity hashes to, the same in every implementation of the protocol.

The canonical form is JSON with sorted keys, lower-cased strings and raw UTF-8; the id is the first 16 characters
of its SHA-256 in lower-case hex. tests/wire/test_source_id.py holds the protocol's vectors.
"""

from __future__ import annotations

import hashlib
import json

from mxserver.wire.proto import p2p_pb2

SOURCE_ID_CHARACTERS = 16

_ALWAYS = ("dtype", "model_name", "mx_version", "quantization", "revision")
_ALWAYS_INTEGERS = (
    "backend_framework",
    "expert_parallel_size",
    "mx_source_type",
    "pipeline_parallel_size",
    "tensor_parallel_size",
)
_ONLY_WHEN_SET = (
    "backend_framework_version",
    "torch_version",
    "cuda_version",
    "triton_version",
    "gpu_arch",
    "compile_config_digest",
)


def canonical_json(identity: p2p_pb2.SourceIdentity) -> str:
    """The text that is hashed."""
    extra: dict[str, str] = {}
    for key in sorted(identity.extra_parameters):  # code points sort as their UTF-8 bytes do
        extra.setdefault(key.lower(), identity.extra_parameters[key].lower())
    fields: dict[str, object] = {name: getattr(identity, name).lower() for name in _ALWAYS}
    fields.update({name: int(getattr(identity, name)) for name in _ALWAYS_INTEGERS})
    fields.update({name: value.lower() for name in _ONLY_WHEN_SET if (value := getattr(identity, name))})
    fields["extra_parameters"] = extra
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def source_id(identity: p2p_pb2.SourceIdentity) -> str:
    """The identity's mx_source_id: 16 lower-case hex digits. Pure; safe from any thread."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:SOURCE_ID_CHARACTERS]
