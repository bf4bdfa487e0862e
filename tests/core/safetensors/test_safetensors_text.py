"""The text level of the header, against Python's own decoders: UTF-8, escapes, integers, blanks."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxcore.safetensors import SafetensorsError
from mxcore.safetensors.errors import HeaderEncoding, HeaderJson, IntegerInvalid
from tests.core.safetensors.headers import parse

EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def name_of(text: bytes) -> str:
    """The name that a header with this text between the quotes gives its one tensor."""
    (tensor,) = parse(b'{"' + text + b'":' + EMPTY + b"}").tensors
    return tensor.name


def metadata_value_of(text: bytes) -> str:
    return parse(b'{"__metadata__":{"k":"' + text + b'"}}').metadata["k"]


def check_encoding(text: bytes) -> None:
    try:
        expected = text.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(HeaderEncoding) as caught:
            metadata_value_of(text)
        # Python says where the broken sequence begins, and so do we: the value begins at byte 8 + 22 of the file.
        assert caught.value.offset == 8 + len('{"__metadata__":{"k":"') + error.start  # noqa: PT017
    else:
        assert metadata_value_of(text) == expected


LEADS = [
    0x7F,
    0x80,
    0xBF,
    0xC0,
    0xC1,
    0xC2,
    0xDF,
    0xE0,
    0xE1,
    0xEC,
    0xED,
    0xEE,
    0xEF,
    0xF0,
    0xF1,
    0xF3,
    0xF4,
    0xF5,
    0xFF,
]
FOLLOWERS = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]


def test_utf8_at_every_edge() -> None:
    """Each lead byte's class with each follower's, cut short or complete, alone and after eight bytes of ASCII."""
    for lead in LEADS:
        check_encoding(bytes([lead]))
        for second in FOLLOWERS:
            check_encoding(bytes([lead, second]))
            check_encoding(b"12345678" + bytes([lead, second]))
            for third, fourth in itertools.product([0x41, 0x7F, 0x80, 0xBF, 0xC0], repeat=2):
                check_encoding(bytes([lead, second, third]))
                check_encoding(b"1234567" + bytes([lead, second, third, fourth]))


@given(st.binary(max_size=40).map(lambda data: bytes(byte for byte in data if byte >= 0x20 and byte not in b'"\\')))
def test_utf8_of_any_bytes(text: bytes) -> None:
    check_encoding(text)


@given(st.text(st.characters(codec="utf-8"), max_size=30))
@example("\ud7ff\ue000\uffff\U00010000\U0010ffff")
@example("\x7f\x80\u07ff\u0800")
def test_any_text_comes_back(text: str) -> None:
    """As UTF-8 and as escapes (json.dumps makes pairs of surrogates beyond the BMP), in values and in keys."""
    for ascii_only in (True, False):
        written = json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode()
        assert metadata_value_of(written) == text
        assert parse(b'{"__metadata__":{"' + written + b'":"v"}}').metadata == {text: "v"}
        if text and "\0" not in text and text != "__metadata__":
            assert name_of(written) == text


def test_every_code_point_of_the_bmp_as_an_escape() -> None:
    for first in range(0, 0x10000, 64):
        codes = range(first, first + 64)
        if 0xD800 <= first < 0xE000:
            for code in codes:
                with pytest.raises(HeaderJson):
                    metadata_value_of(b"\\u%04x" % code)
            continue
        for form in (b"\\u%04x", b"\\u%04X"):
            assert metadata_value_of(b"".join(form % code for code in codes)) == "".join(map(chr, codes))


@pytest.mark.parametrize("low", ["\\udbff", "\\ue000", "\\u0041", "\\n", "x", "", "\\udc0", "\\udcgg", "\\", "\\u"])
def test_half_a_pair_of_surrogates(low: str) -> None:
    with pytest.raises(HeaderJson):
        metadata_value_of(b"\\ud83d" + low.encode())


@pytest.mark.parametrize("kind", [chr(code) for code in range(0x20, 0x7F) if chr(code) not in '"\\/bfnrtu'])
def test_unknown_escapes(kind: str) -> None:
    with pytest.raises(HeaderJson):
        metadata_value_of(b"\\" + kind.encode())


@pytest.mark.parametrize("code", range(0x20))
def test_control_characters_have_to_be_escaped(code: int) -> None:
    with pytest.raises(HeaderJson):
        metadata_value_of(bytes([code]))


@settings(max_examples=300)
@given(st.integers(0, 2**66) | st.integers(2**64 - 40, 2**64 + 40))
@example(0)
@example(2**64 - 1)
@example(2**64)
def test_integers(number: int) -> None:
    """Beside a zero dimension, so that the size is 0; as four bits, so that most of 64 bits pass."""
    header = b'{"a":{"dtype":"F4","shape":[0,%d],"data_offsets":[0,0]}}' % number
    if number < 2**62:
        assert parse(header)["a"].shape == (0, number)
        return
    with pytest.raises(SafetensorsError) as caught:
        parse(header)
    assert isinstance(caught.value, IntegerInvalid) == (number >= 2**64)


@given(st.lists(st.text(" \t\r\n", max_size=3), min_size=19, max_size=19))
def test_blanks_between_any_two_parts(blanks: list[str]) -> None:
    parts = ["{", '"a"', ":", "{", '"dtype"', ":", '"U8"', ",", '"shape"', ":", "[", "0", "]", ","]
    parts += ['"data_offsets"', ":", "[ 0 , 0 ]", "}", "}"]
    text = "".join(part + blank for part, blank in zip(parts, blanks, strict=True))
    header = parse(text.encode())
    assert header["a"].shape == (0,)
    assert header.header_bytes == len(text)


@pytest.mark.parametrize("blank", ["\v", "\f", "\u00a0", "\u2028", "\ufeff", "/**/", "//\n", "#\n"])
def test_other_blanks_are_none(blank: str) -> None:
    for text in ("{%s}", "{}%s", '{"a"%s:1}'):
        with pytest.raises(HeaderJson):
            parse((text % blank).encode())
