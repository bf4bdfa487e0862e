"""Writes the seeds: files that have to be refused, that have to be read, and where safetensors and we differ.

python -m fuzz.make_corpus
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def whole(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with that header, and the length it claims."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(
    dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8), name: str = "a", data: bytes = b"12345678"
) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return whole(json.dumps({name: entry}), data)


def two(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return whole(json.dumps(entries), bytes(data))


A = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

MUST_REJECT = {
    "empty_file": b"",
    "short_length": b"\x01\x00\x00",
    "length_beyond_file": whole("{}", length=3),
    "length_huge": whole("{}", length=2**63),
    "length_over_limit": whole("{}", length=100_000_001),
    "length_zero": whole(""),
    "no_brace": whole(" {}"),
    "no_json": whole("{nul"),
    "no_object": whole("[]"),
    "not_utf8": whole(b'{"\xff":{}}'),
    "cut_json": whole('{"a":{"dtype":"U8"'),
    "trailing_text": whole("{" + A + "}x", b"1"),
    "no_dtype": whole('{"a":{"shape":[1],"data_offsets":[0,1]}}', b"1"),
    "no_shape": whole('{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"1"),
    "no_offsets": whole('{"a":{"dtype":"U8","shape":[1]}}', b"1"),
    "unknown_dtype": one("F1"),
    "negative_shape": one(shape=[-2]),
    "float_shape": one(shape=[2.0]),
    "text_shape": one(shape=["2"]),
    "offsets_backwards": one(offsets=[8, 0]),
    "offsets_one": one(offsets=[0]),
    "offsets_negative": one(offsets=[-8, 0]),
    "offsets_too_short": one(offsets=[0, 4], data=b"1234"),
    "offsets_beyond_file": one(data=b"1234"),
    "product_overflow": one("U8", [2**32, 2**32], [0, 0], data=b""),
    "bits_overflow": one("F64", [2**61], [0, 0], data=b""),
    "hole": two((0, 4), (6, 8), 8),
    "overlap": two((0, 4), (2, 6), 6),
    "hole_at_start": one("U8", [7], [1, 8]),
    "data_left_over": one("U8", [4], [0, 4]),
    "sub_byte_rest": one("F4", [3], [0, 1], data=b"1"),
    "metadata_number": whole('{"__metadata__":{"a":1}}'),
    "metadata_list": whole('{"__metadata__":[]}'),
}
MUST_ACCEPT = {
    "no_tensors": whole("{}"),
    "blanks_after": whole("{}      "),
    "one": one(),
    "scalar": one("F32", [], [0, 4], data=b"1234"),
    "empty_tensor": one("F32", [0, 5], [0, 0], data=b""),
    "metadata": whole('{"__metadata__":{"format":"pt"},' + A + "}", b"1"),
    "metadata_null": whole('{"__metadata__":null,' + A + "}", b"1"),
    "escapes": whole('{"\\u00e9\\n\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "misaligned": two((0, 3), (3, 8), 8),
    "out_of_order": two((4, 8), (0, 4), 8),
    "fp8": one("F8_E4M3", [8], [0, 8]),
    "sub_byte": one("F4", [16], [0, 8]),
}
OUR_CHOICE = {
    "duplicate_name": whole("{" + A + "," + A + "}", b"1"),
    "duplicate_key": whole('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "empty_name": one(name=""),
    "name_with_nul": one(name="a\0b"),
    "unknown_key": whole('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"extra":1}}', b"1"),
    "zero_hides_overflow": one("U8", [2**40, 2**40, 0], [0, 0], data=b""),
    "lone_surrogate": whole('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "name_of_70000_letters": one(name="n" * 70_000),
    "many_dimensions": one("U8", [1] * 500, [0, 1], data=b"1"),
}
FOLDERS = {"must_reject": MUST_REJECT, "must_accept": MUST_ACCEPT, "our_choice": OUR_CHOICE}


def main() -> None:
    """Writes all seeds."""
    for folder, seeds in FOLDERS.items():
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (CORPUS / folder / f"{name}.safetensors").write_bytes(data)


if __name__ == "__main__":
    main()
