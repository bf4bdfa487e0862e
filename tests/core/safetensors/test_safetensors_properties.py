"""The header parser against the `safetensors` package as the oracle.

What safetensors writes, we read equally. Whatever we accept, safetensors accepts with the same result. Where it accepts
and we refuse, the rule is one of those that safetensors_errors documents as stricter.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mxcore.safetensors import Header, SafetensorsError, parse_header, read_header
from mxcore.safetensors import errors as rules
from mxcore.safetensors.scan import DTYPE_BITS
from tests.core.safetensors.headers import file_of

STRICTER = (
    rules.HeaderStart,
    rules.DuplicateKey,
    rules.NameInvalid,
    rules.EntryNotObject,
    rules.FieldUnknown,
    rules.DtypeUnknown,
    rules.ShapeInvalid,
    rules.SizeOverflow,
)

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"),
    min_size=1,
    max_size=20,
).filter(lambda name: name != "__metadata__")
texts = st.text(st.characters(codec="utf-8"), max_size=20)
shapes = st.lists(st.integers(0, 5), max_size=4)
dtypes = st.sampled_from(sorted(DTYPE_BITS))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    """Names to what safetensors.serialize takes, of all dtypes; sub-byte ones fill whole bytes."""
    result: dict[str, dict[str, object]] = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype, shape = draw(dtypes), draw(shapes)
        if DTYPE_BITS[dtype] % 8:
            shape = [*shape, 4]
        bits = DTYPE_BITS[dtype] * int(np.prod(shape, dtype=np.int64))
        result[name] = {"dtype": dtype, "shape": shape, "data": draw(st.binary(min_size=bits // 8, max_size=bits // 8))}
    return result


def oracle(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors makes of a file, or None where it refuses."""
    try:
        parsed = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in parsed}


def ours(header: Header, file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    start = header.data_offset
    return {
        tensor.name: (tensor.dtype, tensor.shape, file[start + tensor.begin : start + tensor.end])
        for tensor in header.tensors
    }


def text_of(value: object) -> bytes:
    """JSON in UTF-8, as compact as safetensors writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def make_file(content: dict[str, dict[str, object]], metadata: dict[str, str] | None = None) -> bytes:
    """A file with these tensors one after the other; for all dtypes, which no array package has."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in content.items():
        piece = tensor["data"]
        assert isinstance(piece, bytes)
        header[name] = {
            "dtype": tensor["dtype"],
            "shape": tensor["shape"],
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    return file_of(text_of(header), data)


@given(tensors(), st.none() | st.dictionaries(texts, texts, max_size=4))
def test_what_is_well_formed_is_read_as_the_oracle_reads_it(
    content: dict[str, dict[str, object]], metadata: dict[str, str] | None
) -> None:
    file = make_file(content, metadata)
    header = parse_header(file, len(file))
    assert ours(header, file) == oracle(file)
    assert header.metadata == (metadata or {})
    assert [tensor.begin for tensor in header.tensors] == sorted(tensor.begin for tensor in header.tensors)


@given(
    st.dictionaries(
        names, st.tuples(st.sampled_from(["f4", "f2", "i8", "u1", "?", "c8", "u8"]), shapes), min_size=1, max_size=6
    ),
    st.none() | st.dictionaries(texts, texts, max_size=4),
)
def test_what_safetensors_writes_is_read_equally(
    content: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in content.items()}
    file = safetensors.numpy.save(arrays, metadata)
    header = parse_header(file, len(file))
    assert ours(header, file) == oracle(file)
    assert header.metadata == (metadata or {})


def test_a_file_that_torch_wrote(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    content = {
        "bf16": torch.ones(3, 5, dtype=torch.bfloat16),
        "fp8": torch.ones(7).to(torch.float8_e4m3fn),
        "fp8_e5m2": torch.ones(7).to(torch.float8_e5m2),
        "scale": torch.ones((), dtype=torch.float32),
        "empty": torch.ones(0, 4),
        "flag": torch.ones(3, dtype=torch.bool),
    }
    save_file(content, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {tensor.name for tensor in header.tensors}
        for tensor in header.tensors:
            view = file.get_slice(tensor.name)
            assert (view.get_dtype(), tuple(view.get_shape())) == (tensor.dtype, tensor.shape)
            assert tensor.size_bytes == content[tensor.name].nbytes


def parsed_or_error(file: bytes) -> Header | SafetensorsError:
    try:
        return parse_header(file, len(file))
    except SafetensorsError as error:
        return error


def has_key_twice(file: bytes) -> bool:
    """Whether an object of the header has: safetensors does not look at the values that it drops then, and we do."""
    found = False

    def look(pairs: list[tuple[str, object]]) -> None:
        nonlocal found
        found = found or len({key for key, _ in pairs}) < len(pairs)

    json.loads(file[8 : 8 + struct.unpack("<Q", file[:8])[0]], object_pairs_hook=look)
    return found


def check_against_oracle(file: bytes) -> None:
    expected = oracle(file)
    result = parsed_or_error(file)
    if isinstance(result, Header):
        event("accepted")
        assert ours(result, file) == expected
        return
    event(f"refused: {result.code}")
    assert result.offset <= max(len(file), 8)
    if expected is not None and not has_key_twice(file):
        assert isinstance(result, STRICTER), f"{type(result).__name__}, but safetensors reads {expected}: {file!r}"


FRAGMENTS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"1", b"9", b"-", b".", b"e5", b" ", b"\n", b"\0", b"\xff",
    b"\xc3\xa9", b"\\u0000", b"\\u0041", b"\\ud83d\\ude00", b"\\ud83d", b"null", b"true", b"18446744073709551616",
    b"18446744073709551615", b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__":', b'"U8"', b'"F4"',
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
]  # fmt: skip

edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["insert", "replace", "delete", "swap"]), st.sampled_from(FRAGMENTS)),
    min_size=1,
    max_size=3,
)


def mutate(text: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, fragment in changes:
        at = int(where * len(text))
        if kind == "insert":
            text = text[:at] + fragment + text[at:]
        elif kind == "replace":
            text = text[:at] + fragment + text[at + len(fragment) :]
        elif kind == "delete":
            text = text[:at] + text[at + len(fragment) :]
        else:
            text = text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
    return text


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(tensors(), st.none() | st.dictionaries(texts, texts, max_size=2), edits)
def test_mutated_headers(
    content: dict[str, dict[str, object]], metadata: dict[str, str] | None, changes: list[tuple[float, str, bytes]]
) -> None:
    file = make_file(content, metadata)
    length = struct.unpack("<Q", file[:8])[0]
    check_against_oracle(file_of(mutate(file[8 : 8 + length], changes), file[8 + length :]))


numbers = st.integers(0, 6) | st.sampled_from([-1, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 1.0, True, None, "1", [1]])
values = st.none() | numbers | st.lists(numbers, max_size=4) | st.sampled_from(["U8", "F4", "F6_E3M2", "BF16", "X", ""])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F4", "F6_E3M2", "BF16"]) | values,
        "shape": st.lists(numbers, max_size=3) | values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | values,
        "more": values,
    },
)


@settings(max_examples=600)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entries | values, max_size=3),
    st.binary(max_size=6),
)
def test_json_of_other_forms(header: dict[str, object], data: bytes) -> None:
    check_against_oracle(file_of(text_of(header), data))


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    check_against_oracle(data)
    check_against_oracle(file_of(b'{"' + data))


def test_each_documented_difference_is_one() -> None:
    """Files that safetensors reads and we refuse, one for each class that says so."""
    one = b'"dtype":"U8","shape":[0],"data_offsets":[0,0]'
    wide = b'{"a":{"dtype":"U8","shape":[' + b"1," * 64 + b'0],"data_offsets":[0,0]}}'
    for text, rule in (
        (b' {"a":{' + one + b"}}", rules.HeaderStart),
        (b'{"a":{' + one + b'},"a":{' + one + b"}}", rules.DuplicateKey),
        (b'{"":{' + one + b"}}", rules.NameInvalid),
        (b'{"a":["U8",[0],[0,0]]}', rules.EntryNotObject),
        (b'{"a":{' + one + b',"x":{}}}', rules.FieldUnknown),
        (b'{"a":{"dtype":{"U8":null},"shape":[0],"data_offsets":[0,0]}}', rules.DtypeUnknown),
        (wide, rules.ShapeInvalid),
        (b'{"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}', rules.SizeOverflow),
    ):
        assert "Stricter than safetensors" in (rule.__doc__ or "")
        file = file_of(text)
        assert oracle(file) is not None, text
        assert type(parsed_or_error(file)) is rule
    documented = {kind for kind in vars(rules).values() if "Stricter than" in (getattr(kind, "__doc__", None) or "")}
    assert documented - {rules} == set(STRICTER)
