"""The source id: the protocol's vectors, and what must and must not change it."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mxserver.wire.calls import canonical_json, source_id
from mxserver.wire.proto import p2p_pb2


def deepseek(**fields: object) -> p2p_pb2.SourceIdentity:
    return p2p_pb2.SourceIdentity(
        mx_version="0.5.0",
        model_name="deepseek-ai/DeepSeek-V3",
        backend_framework=p2p_pb2.BACKEND_FRAMEWORK_VLLM,
        tensor_parallel_size=8,
        pipeline_parallel_size=1,
        dtype="bfloat16",
        **fields,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "5a5f555570065064"),
        ({"revision": "abc123def4567890"}, "d0c184b2a9a34c82"),
        ({"extra_parameters": {"Foo": "a", "foo": "b"}}, "bf71fb9340cd940a"),
    ],
)
def test_vectors_of_the_protocol(fields: dict[str, object], expected: str) -> None:
    assert source_id(deepseek(**fields)) == expected


def test_canonical_form_of_an_empty_identity_has_all_fixed_keys() -> None:
    assert canonical_json(p2p_pb2.SourceIdentity()) == (
        '{"backend_framework":0,"dtype":"","expert_parallel_size":0,"extra_parameters":{},"model_name":"",'
        '"mx_source_type":0,"mx_version":"","pipeline_parallel_size":0,"quantization":"","revision":"",'
        '"tensor_parallel_size":0}'
    )


STRINGS = ("mx_version", "model_name", "dtype", "quantization", "revision")
OPTIONAL = (
    "backend_framework_version",
    "torch_version",
    "cuda_version",
    "triton_version",
    "gpu_arch",
    "compile_config_digest",
)
NUMBERS = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
ENUMS = {"mx_source_type": st.integers(0, 9), "backend_framework": st.integers(0, 3)}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
identities = st.builds(
    p2p_pb2.SourceIdentity,
    **dict.fromkeys((*STRINGS, *OPTIONAL), texts),
    **dict.fromkeys(NUMBERS, st.integers(0, 2**32 - 1)),
    **ENUMS,
    extra_parameters=st.dictionaries(texts, texts, max_size=4),
)


@given(identities)
def test_id_is_the_start_of_the_digest_of_lower_cased_sorted_compact_json(identity: p2p_pb2.SourceIdentity) -> None:
    text = canonical_json(identity)
    parsed = json.loads(text)
    assert text == json.dumps(parsed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert all(value == value.lower() for value in parsed.values() if isinstance(value, str))
    assert source_id(identity) == hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@given(identities)
def test_empty_optional_fields_are_left_out_and_others_are_in(identity: p2p_pb2.SourceIdentity) -> None:
    parsed = json.loads(canonical_json(identity))
    assert {name for name in OPTIONAL if name in parsed} == {name for name in OPTIONAL if getattr(identity, name)}


@given(identities)
def test_ascii_case_does_not_matter(identity: p2p_pb2.SourceIdentity) -> None:
    other = p2p_pb2.SourceIdentity()
    other.CopyFrom(identity)
    for name in (*STRINGS, *OPTIONAL):
        value = getattr(identity, name)
        assume(value.upper().lower() == value.lower())  # "ß" and its kind have no way back
        setattr(other, name, value.upper())
    assert source_id(other) == source_id(identity)


@given(identities, st.sampled_from((*STRINGS, *OPTIONAL, *NUMBERS, *ENUMS)))
def test_each_field_changes_the_id(identity: p2p_pb2.SourceIdentity, name: str) -> None:
    other = p2p_pb2.SourceIdentity()
    other.CopyFrom(identity)
    value = getattr(identity, name)
    setattr(other, name, value + "x" if isinstance(value, str) else (value + 1) % 4)
    assert source_id(other) != source_id(identity)


@given(st.dictionaries(texts, texts, max_size=6))
def test_of_keys_that_differ_in_case_the_first_in_byte_order_counts(extra: dict[str, str]) -> None:
    expected: dict[str, str] = {}
    for key in sorted(extra, key=lambda key: key.encode()):
        expected.setdefault(key.lower(), extra[key].lower())
    assert json.loads(canonical_json(deepseek(extra_parameters=extra)))["extra_parameters"] == expected


def test_unicode_is_hashed_as_it_is() -> None:
    text = canonical_json(deepseek(extra_parameters={"Ärger": "日本"}, revision='a"\n\x7f'))
    assert '"ärger":"日本"' in text
    assert '"revision":"a\\"\\n\x7f"' in text
