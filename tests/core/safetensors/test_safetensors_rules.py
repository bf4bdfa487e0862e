"""One test a rule of the header, with the bytes that break it, and what the error says."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mxcore.errors import StorageError
from mxcore.safetensors import Header, parse_header, read_header
from mxcore.safetensors import errors as rules
from mxcore.safetensors.header import TensorEntry
from tests.core.safetensors.headers import entry, file_of, parse

ONE = b'"dtype":"U8","shape":[1],"data_offsets":[0,1]'
NONE = b'"dtype":"U8","shape":[0],"data_offsets":[0,0]'


def one(name: bytes) -> bytes:
    return b'{"' + name + b'":{' + ONE + b"}}"


# (rule, header, data, offset in the file at which the parser stops or None, tensor that the error names)
BROKEN: list[tuple[type[rules.SafetensorsError], bytes, bytes, int | None, str]] = [
    (rules.HeaderStart, b" " + one(b"a"), b"1", 8, ""),
    (rules.HeaderStart, b"[]", b"", 8, ""),
    (rules.HeaderStart, b"", b"", 8, ""),
    (rules.HeaderStart, b"\xef\xbb\xbf{}", b"", 8, ""),
    (rules.HeaderEncoding, one(b"a\xff"), b"1", 11, ""),
    (rules.HeaderEncoding, one(b"\xc0\x80"), b"1", 10, ""),  # overlong
    (rules.HeaderEncoding, one(b"\xe0\x9f\xbf"), b"1", 10, ""),  # overlong
    (rules.HeaderEncoding, one(b"\xf0\x8f\xbf\xbf"), b"1", 10, ""),  # overlong
    (rules.HeaderEncoding, one(b"\xed\xa0\x80"), b"1", 10, ""),  # surrogate
    (rules.HeaderEncoding, one(b"\xf4\x90\x80\x80"), b"1", 10, ""),  # beyond U+10FFFF
    (rules.HeaderEncoding, one(b"\xf5\x80\x80\x80"), b"1", 10, ""),
    (rules.HeaderEncoding, one(b"12345678\x80"), b"1", 18, ""),
    (rules.HeaderEncoding, b'{"\xe2\x82', b"", 10, ""),  # cut short at the end
    (rules.HeaderJson, b"{", b"", 9, ""),
    (rules.HeaderJson, b'{"a', b"", 11, ""),
    (rules.HeaderJson, b'{"a"', b"", 12, ""),
    (rules.HeaderJson, b'{"a":{' + ONE, b"1", 8 + 6 + len(ONE), "a"),
    (rules.HeaderJson, b'{"a":{' + ONE + b"}", b"1", 8 + 7 + len(ONE), ""),
    (rules.HeaderJson, one(b"a") + b"x", b"1", 8 + len(one(b"a")), ""),
    (rules.HeaderJson, one(b"a") + b"\0", b"1", 8 + len(one(b"a")), ""),
    (rules.HeaderJson, one(b"a") + b"{}", b"1", 8 + len(one(b"a")), ""),
    (rules.HeaderJson, b'{"a":{' + ONE + b"},}", b"1", 8 + 8 + len(ONE), ""),
    (rules.HeaderJson, b'{"a":{' + ONE + b",}}", b"1", None, "a"),
    (rules.HeaderJson, b'{"a" {' + ONE + b"}}", b"1", 13, ""),
    (rules.HeaderJson, b"{a:1}", b"", 9, ""),
    (rules.HeaderJson, one(b"a\n"), b"1", 11, ""),  # a control character
    (rules.HeaderJson, one(b"a\0b"), b"1", 11, ""),
    (rules.HeaderJson, one(rb"a\x"), b"1", 11, ""),
    (rules.HeaderJson, one(rb"a\u12g4"), b"1", 11, ""),
    (rules.HeaderJson, one(rb"a\ud800"), b"1", 11, ""),  # a lone surrogate
    (rules.HeaderJson, one(rb"a\udc00"), b"1", 11, ""),
    (rules.HeaderJson, one(rb"a\ud800A"), b"1", 11, ""),
    (rules.HeaderJson, b'{"a\\', b"", 11, ""),
    (rules.HeaderJson, b'{"a\\ud83d\\', b"", 11, ""),
    (rules.IntegerInvalid, b'{"a":{"dtype":"U8","shape":[1,],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.DuplicateKey, b'{"a":{' + ONE + b'},"a":{' + ONE + b"}}", b"1", None, "a"),
    (rules.DuplicateKey, b'{"a":{' + NONE + b'},"\\u0061":{' + NONE + b"}}", b"", None, "a"),
    (rules.DuplicateKey, b'{"a":{' + ONE + b',"dtype":"U8"}}', b"1", None, "a"),
    (rules.DuplicateKey, b'{"a":{' + ONE + b',"\\u0064type":"U8"}}', b"1", None, "a"),
    (rules.DuplicateKey, b'{"__metadata__":{"k":"1","k":"2"}}', b"", 34, ""),
    (rules.DuplicateKey, b'{"__metadata__":{"k":"1","\\u006b":"2"}}', b"", 34, ""),
    (rules.DuplicateKey, b'{"__metadata__":{},"__metadata__":{}}', b"", 28, ""),
    (rules.DuplicateKey, b'{"__metadata__":{},"\\u005f_metadata__":{}}', b"", 28, ""),
    (rules.MetadataNotStrings, b'{"__metadata__":nul}', b"", 24, ""),
    (rules.DuplicateKey, b'{"__metadata__":null,"__metadata__":null}', b"", 30, ""),
    (rules.MetadataNotStrings, b'{"__metadata__":{"k":1}}', b"", 29, ""),
    (rules.MetadataNotStrings, b'{"__metadata__":{"k":{}}}', b"", 29, ""),
    (rules.MetadataNotStrings, b'{"__metadata__":{' + ONE + b"}}", b"1", None, ""),
    (rules.NameInvalid, one(b""), b"1", 10, ""),
    (rules.NameInvalid, one(rb"a\u0000"), b"1", 10, "a\0"),
    (rules.NameInvalid, one(b"a" * 4097), b"1", 10, ""),
    (rules.NameInvalid, one(rb"\u0061" * 4097), b"1", 10, ""),
    (rules.NameInvalid, one(rb"\u0061" + b"a" * 4096), b"1", 10, "a" * 4097),
    (rules.EntryNotObject, b'{"a":["U8",[1],[0,1]]}', b"1", 13, ""),
    (rules.EntryNotObject, b'{"a":null}', b"", 13, "a"),
    (rules.FieldUnknown, b'{"a":{' + ONE + b',"x":1}}', b"1", None, "a"),
    (rules.FieldUnknown, b'{"a":{"' + rb"\u0064" * 17 + b'":1}}', b"1", 15, "a"),
    (rules.FieldMissing, b'{"a":{}}', b"", 14, "a"),
    (rules.FieldMissing, b'{"a":{"dtype":"U8","shape":[1]}}', b"1", None, "a"),
    (rules.FieldMissing, b'{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.FieldMissing, b'{"a":{"shape":[1],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.DtypeUnknown, b'{"a":{"dtype":"U7","shape":[1],"data_offsets":[0,1]}}', b"1", 23, "a"),
    (rules.DtypeUnknown, b'{"a":{"dtype":"u8","shape":[1],"data_offsets":[0,1]}}', b"1", 23, "a"),
    (rules.DtypeUnknown, b'{"a":{"dtype":"U88","shape":[1],"data_offsets":[0,1]}}', b"1", 23, "a"),
    (rules.DtypeUnknown, b'{"a":{"dtype":"","shape":[1],"data_offsets":[0,1]}}', b"1", 23, "a"),
    (rules.DtypeUnknown, b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', b"1", 22, "a"),
    (rules.ShapeInvalid, b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', b"1", 35, "a"),
    (rules.ShapeInvalid, b'{"a":{"dtype":"U8","shape":[' + b"1," * 64 + b'1],"data_offsets":[0,1]}}', b"1", 164, "a"),
    (rules.OffsetsInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":1}}', b"1", 54, "a"),
    (rules.OffsetsInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[]}}', b"1", 55, "a"),
    (rules.OffsetsInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', b"1", 56, "a"),
    (rules.OffsetsInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', b"1", 58, "a"),
    (rules.OffsetsInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', b"1", 58, "a"),
    *[
        (rules.IntegerInvalid, b'{"a":{"dtype":"U8","shape":[' + number + b'],"data_offsets":[0,1]}}', b"1", 36, "a")
        for number in (b"-1", b"-0", b"1.0", b"1e0", b"01", b"00", b"18446744073709551616", b"99999999999999999999")
    ],
    *[
        (rules.IntegerInvalid, b'{"a":{"dtype":"U8","shape":[' + value + b'],"data_offsets":[0,1]}}', b"1", 36, "a")
        for value in (b"true", b"null", b'"1"', b"[1]", b"{}", b"+1", b"NaN")
    ],
    (rules.IntegerInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,1]}}', b"1", 55, "a"),
    (rules.IntegerInvalid, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}', b"1", 57, "a"),
    (rules.SizeOverflow, b'{"a":{"dtype":"U8","shape":[2305843009213693952],"data_offsets":[0,0]}}', b"", None, "a"),
    (rules.SizeOverflow, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b"", None, "a"),
    (
        rules.SizeOverflow,
        b'{"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}',
        b"",
        None,
        "a",
    ),
    (
        rules.SizeOverflow,
        b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}',
        b"",
        None,
        "a",
    ),
    (rules.PartialByte, b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.PartialByte, b'{"a":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.SizeMismatch, b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.SizeMismatch, b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.SizeMismatch, b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,1]}}', b"1", None, "a"),
    (rules.RangeBeyondFile, one(b"a"), b"", 10, "a"),
    (rules.RangesOverlap, b'{"a":{' + ONE + b'},"b":{' + ONE + b"}}", b"1", None, "b"),
    (rules.RangesHole, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12", 10, "a"),
    (rules.DataNotCovered, one(b"a"), b"12", 8, ""),
    (rules.DataNotCovered, b"{}", b"1", 8, ""),
]


@pytest.mark.parametrize(("rule", "header", "data", "offset", "tensor"), BROKEN)
def test_broken_rule(
    rule: type[rules.SafetensorsError], header: bytes, data: bytes, offset: int | None, tensor: str
) -> None:
    with pytest.raises(rules.SafetensorsError) as caught:
        parse(header, data)
    error = caught.value
    assert type(error) is rule
    assert error.file == "t.safetensors"
    assert offset is None or error.offset == offset
    assert 8 <= error.offset <= 8 + len(header)
    if tensor or rule is not rules.EntryNotObject:
        assert error.tensor == tensor
    assert str(error).endswith(f"[{rule.code}]")
    assert f"byte {error.offset}" in str(error)
    assert error.rule in str(error)


def test_length_rules() -> None:
    """Those that are broken before there is a header: by the 8 bytes of its length and the file's size."""
    for data, file_bytes, rule in (
        (b"", 0, rules.FileTooSmall),
        (b"1234567", 7, rules.FileTooSmall),
        (struct.pack("<Q", 100_000_001) + b"{", 200_000_000, rules.HeaderTooLarge),
        (struct.pack("<Q", 2**64 - 1) + b"{", 200_000_000, rules.HeaderTooLarge),
        (struct.pack("<Q", 3) + b"{}", 10, rules.HeaderBeyondFile),
        (struct.pack("<Q", 100_000_000) + b"{}", 10, rules.HeaderBeyondFile),
        (b"1234", 100, rules.HeaderIncomplete),
        (struct.pack("<Q", 50) + b"{}", 100, rules.HeaderIncomplete),
    ):
        with pytest.raises(rule) as caught:
            parse_header(data, file_bytes)
        assert type(caught.value) is rule
        assert caught.value.file == "<memory>"


def test_every_rule_has_its_own_code_and_a_test() -> None:
    classes = [
        value for value in vars(rules).values() if isinstance(value, type) and value.__module__ == rules.__name__
    ]
    codes = [value.code for value in classes]
    assert len(set(codes)) == len(codes)
    assert all(code.startswith("MX_SAFETENSORS") for code in codes)
    tested = {rule for rule, *_ in BROKEN} | {
        rules.FileTooSmall,
        rules.HeaderTooLarge,
        rules.HeaderBeyondFile,
        rules.HeaderIncomplete,
        rules.SafetensorsError,
    }
    assert set(classes) == tested
    assert all(value.code in (rules.__doc__ or "") for value in classes)


def test_an_error_survives_pickling() -> None:
    with pytest.raises(rules.DtypeUnknown) as caught:
        parse({"a": entry("U7", [1], 0, 1)}, b"1")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert type(copy) is rules.DtypeUnknown
    assert (str(copy), copy.file, copy.tensor, copy.offset) == (
        str(caught.value),
        "t.safetensors",
        "a",
        caught.value.offset,
    )


def test_accepted_forms() -> None:
    """What is unusual and still right: blanks everywhere, escapes, any order of fields and tensors."""
    header = parse(
        b'{ "b" : {"data_offsets"\t:[ 1 , 3 ],"\\u0073hape":[ 2 , 1 ],"dtype":"\\u0055\\u0038"} ,\r\n'
        b'"\\ud83d\\ude00\\n\\"\\/\\\\\\b\\f\\r\\t\\u00e9\\u20ac" :{' + ONE + b"},"
        b'"__metadata__" : { "k" : "\\u0000v" , "" : "" } } \n\t\r ',
        b"123",
    )
    assert [tensor.name for tensor in header.tensors] == ['😀\n"/\\\b\f\r\té€', "b"]
    assert header.metadata == {"k": "\0v", "": ""}
    assert header["b"].shape == (2, 1)
    assert (header["b"].begin, header["b"].end, header["b"].size_bytes) == (1, 3, 2)
    assert "b" in header
    assert "c" not in header
    assert len(header) == 2
    assert repr(header["b"]) == "TensorEntry('b', U8, [2, 1], [1, 3])"
    with pytest.raises(KeyError):
        header["c"]


def test_empty_headers() -> None:
    for text in (b"{}", b"{ }", b'{"__metadata__":{}}', b'{"__metadata__":{ } }  ', b'{"__metadata__":null}'):
        header = parse(text)
        assert header.tensors == ()
        assert header.metadata == {}
        assert header.header_bytes == len(text)
        assert header.data_offset == 8 + len(text)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("BOOL", 8), ("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("U8", 8), ("I8", 8), ("F8_E5M2", 8), ("F8_E4M3", 8),
        ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("I16", 16), ("U16", 16), ("F16", 16), ("BF16", 16),
        ("I32", 32), ("U32", 32), ("F32", 32), ("C64", 64), ("F64", 64), ("I64", 64), ("U64", 64),
    ],
)  # fmt: skip
def test_dtypes(dtype: str, bits: int) -> None:
    header = parse({"a": entry(dtype, [2, 4], 0, bits)}, bytes(bits))
    assert header["a"].dtype == dtype


def test_largest_numbers() -> None:
    """2^64 - 1 is read exactly, in shapes and offsets; a zero elsewhere makes the tensor empty."""
    largest = 2**64 - 1
    assert parse({"a": entry("F4", [0, 2**62 - 1], 0, 0)})["a"].shape == (0, 2**62 - 1)
    with pytest.raises(rules.SizeOverflow):
        parse({"a": entry("U8", [0, largest], 0, 0)})
    with pytest.raises(rules.SizeMismatch, match=f"span {largest}"):
        parse({"a": entry("U8", [1], 0, largest)}, b"1")


def test_empty_tensors_lie_anywhere_between_others() -> None:
    header = parse(
        {
            "z": entry("U8", [0], 2, 2),
            "b": entry("U8", [2], 2, 4),
            "a": entry("U8", [2], 0, 2),
            "e": entry("U8", [0], 4, 4),
        },
        b"1234",
    )
    assert [tensor.name for tensor in header.tensors] == ["a", "z", "b", "e"]
    with pytest.raises(rules.RangesOverlap):
        parse({"a": entry("U8", [2], 0, 2), "z": entry("U8", [0], 1, 1)}, b"12")


def test_deep_nesting_needs_no_stack() -> None:
    for deep in (b"[" * 5_000_000, b'{"a":' * 1_000_000):
        with pytest.raises(rules.SafetensorsError):
            parse(b'{"a":' + deep)
        with pytest.raises(rules.IntegerInvalid):
            parse(b'{"a":{"shape":[' + deep)
        with pytest.raises(rules.MetadataNotStrings):
            parse(b'{"__metadata__":{"a":' + deep)


def test_every_cut_of_a_header_is_refused() -> None:
    text = (
        b'{"__metadata__":{"k":"v"},"a\\n\\ud83d\\ude00":{'
        + ONE
        + b'},"\xe2\x82\xac":{"dtype":"U8","shape":[0,1],"data_offsets":[1,1]}}'
    )
    assert len(parse(text, b"1").tensors) == 2
    for length in range(len(text)):
        with pytest.raises(rules.SafetensorsError):
            parse(text[:length], b"1")


def test_any_buffer_is_taken_and_none_is_kept() -> None:
    file = bytearray(file_of(one(b"a"), b"1"))
    for data in (bytes(file), file, memoryview(file), memoryview(file).toreadonly()):
        assert parse_header(data, len(file))["a"].end == 1
    del data
    file.clear()  # possible only if no export is left
    with pytest.raises(TypeError):
        parse_header("text", 4)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        parse_header(memoryview(b"0123456789" * 10)[::2], 50)
    with pytest.raises(OverflowError):
        parse_header(b"", -1)


def test_only_the_parser_makes_headers() -> None:
    for kind in (Header, TensorEntry):
        with pytest.raises(TypeError, match="made by read_header"):
            kind()
    header = parse(one(b"a"), b"1")
    with pytest.raises(AttributeError):
        header["a"].begin = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        pickle.dumps(header)


def test_many_tensors_out_of_order() -> None:
    count = 5000
    names = {f"t{i}": entry("U8", [1], count - 1 - i, count - i) for i in range(count)}
    header = parse(names, bytes(count))
    assert [tensor.begin for tensor in header.tensors] == list(range(count))
    assert header.tensors[0].name == f"t{count - 1}"


def test_read_header_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m\N{SNOWMAN}.safetensors"
    path.write_bytes(file_of(one(b"a"), b"1"))
    for form in (path, str(path), os.fsencode(path)):
        assert read_header(form)["a"].size_bytes == 1
    path.write_bytes(file_of(one(b"a")))
    with pytest.raises(rules.RangeBeyondFile) as caught:
        read_header(path)
    assert caught.value.file == str(path)
    for text, rule in (
        (b"", rules.FileTooSmall),
        (struct.pack("<Q", 10**8) + b"{}", rules.HeaderBeyondFile),
        (struct.pack("<Q", 10**9) + b"{}", rules.HeaderTooLarge),
    ):
        path.write_bytes(text)
        with pytest.raises(rule):
            read_header(path)


def test_a_large_sparse_file_is_read_by_its_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    data_bytes = 6 * 1024**3
    path.write_bytes(file_of({"a": entry("BF16", [data_bytes // 2], 0, data_bytes)}))
    header_bytes = path.stat().st_size
    os.truncate(path, header_bytes + data_bytes)
    assert read_header(path)["a"].end == data_bytes


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)  # with nobody writing to it: opening it the usual way would wait for ever
    for path, message in (
        (tmp_path / "none", "cannot be opened: No such file"),
        (tmp_path, "not a regular file"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ):
        with pytest.raises(StorageError, match=message):
            read_header(path)
    with pytest.raises(StorageError, match="no NUL"):
        read_header(b"a\0b")


def test_a_refused_length_allocates_nothing(tmp_path: Path) -> None:
    """Under a limit of address space that a header of 100 MB would break."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{}")
    script = (
        "import resource, sys\n"
        "from mxcore.safetensors.header import read_header\n"
        "from mxcore.safetensors.errors import HeaderBeyondFile\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)\n"
        "try:\n    read_header(sys.argv[1])\nexcept HeaderBeyondFile:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "refused\n"
