"""mixsum-64 against its definition, its vectors, and what docs/reference/digests.md says that it detects."""

from __future__ import annotations

import array
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.digest import mixsum_64_many
from mxcore.digest.digest import _choose_mixsum_vectors, mixsum_64, mixsum_64_segments
from mxcore.memory import HostBuffer

KEY = 0x9E3779B97F4A7C15
MASK = 2**64 - 1

# (bytes, mixsum-64). The first bytes of 0, 1, 2, ... (modulo 251), computed by `definition` on 2026-11-25
VECTORS = [
    (0, 0x48218226FF3CD4BF),
    (1, 0x5699ABAAF7AD308F),
    (7, 0x6F28E3A15B6071B6),
    (8, 0x6BE2FA25802B9543),
    (9, 0x128A614251EAFEF3),
    (63, 0x92DC9D7FA67B2E9B),
    (64, 0xD1462973FC81B76F),
    (65, 0x228045FC1048F0EB),
    (1000, 0x72B7DE41CB7A0E67),
    (4096, 0x805C3900A46B7D05),
    (65536, 0xC92215DB407DE13F),
    (100003, 0x5B3E5BF4CA511A09),
]


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def definition(data: bytes) -> int:
    """As docs/reference/digests.md has it, slowly."""
    total = 0
    for index, begin in enumerate(range(0, len(data), 8)):
        word = int.from_bytes(data[begin : begin + 8].ljust(8, b"\0"), "little")
        total += mix(word ^ ((index + 1) * KEY & MASK))
    return mix((total + mix(len(data) ^ KEY)) & MASK)


def counted(length: int) -> bytes:
    return bytes(index % 251 for index in range(length))


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def _width(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every loop that this processor has."""
    if _choose_mixsum_vectors(request.param) != request.param:
        _choose_mixsum_vectors(2)
        pytest.skip("this processor has no such vectors")
    yield
    _choose_mixsum_vectors(2)


@pytest.mark.usefixtures("_width")
@pytest.mark.parametrize(("length", "digest"), VECTORS)
def test_vectors(length: int, digest: int) -> None:
    assert definition(counted(length)) == digest
    assert mixsum_64(counted(length)) == digest


@pytest.mark.usefixtures("_width")
def test_every_short_length_and_alignment() -> None:
    data = random.Random(5).randbytes(400)
    view = memoryview(data)
    for begin in range(9):
        for length in range(0, 300, 7):
            assert mixsum_64(view[begin : begin + length]) == definition(data[begin : begin + length])


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_segments_are_one_stretch(parts: list[bytes]) -> None:
    arrays = [np.frombuffer(part, np.uint8) for part in parts]
    addresses = [part.ctypes.data if part.size else 0 for part in arrays]
    assert mixsum_64_segments(addresses, [part.size for part in arrays]) == definition(b"".join(parts))


@pytest.mark.parametrize("threads", [1, 3])
def test_many_digests_of_many_groups(threads: int) -> None:
    data = np.frombuffer(random.Random(6).randbytes(200_000), np.uint8)
    starts, addresses, lengths, expected = array.array("Q", [0]), array.array("Q"), array.array("Q"), []
    chance = random.Random(7)
    for _ in range(50):
        joined = b""
        for _ in range(chance.randrange(5)):
            begin, size = chance.randrange(100_000), chance.randrange(3000)
            addresses.append(data.ctypes.data + begin)
            lengths.append(size)
            joined += data[begin : begin + size].tobytes()
        starts.append(len(addresses))
        expected.append(mixsum_64(joined))
    digests = mixsum_64_many(addresses, lengths, starts, threads=threads)
    assert [int.from_bytes(digests[at : at + 8], "little") for at in range(0, len(digests), 8)] == expected


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no memory"):
        mixsum_64_segments([0], [1])
    with pytest.raises(ValueError, match="addresses"):
        mixsum_64_segments([1, 2], [1])
    with pytest.raises(TypeError):
        mixsum_64("text")  # type: ignore[arg-type]


# ---- what it detects (docs/reference/digests.md) ----


def test_any_change_within_a_word_is_seen() -> None:
    """Certain, not likely: mixing is a bijection. Here every single bit of 1 KiB, and random words."""
    chance = random.Random(8)
    for length in (1, 7, 8, 1024):
        data = bytearray(chance.randbytes(length))
        right = mixsum_64(data)
        for bit in range(8 * length):
            data[bit // 8] ^= 1 << bit % 8
            assert mixsum_64(data) != right
            data[bit // 8] ^= 1 << bit % 8
    buffer = np.frombuffer(bytearray(chance.randbytes(8192)), np.uint64).copy()
    right = mixsum_64(buffer)
    for _ in range(2000):
        at, value = chance.randrange(1024), chance.getrandbits(64)
        kept = buffer[at]
        buffer[at] = value
        assert (mixsum_64(buffer) == right) == (kept == value)
        buffer[at] = kept


def test_mixing_is_a_bijection() -> None:
    """Undone step by step: no two words are mixed to one."""
    inverse = [pow(0x94D049BB133111EB, -1, 2**64), pow(0xBF58476D1CE4E5B9, -1, 2**64)]

    def unshift(word: int, by: int) -> int:
        result = word
        for _ in range(64 // by):
            result = word ^ (result >> by)
        return result

    chance = random.Random(9)
    for _ in range(1000):
        word = chance.getrandbits(64)
        back = unshift(mix(word), 31)
        back = unshift(back * inverse[0] & MASK, 27)
        assert unshift(back * inverse[1] & MASK, 30) == word


def test_the_same_bit_flipped_in_two_words_is_seen() -> None:
    """The top bit of a factor only flips the product's: a weaker mix would let two such changes cancel half the time.

    The sums' low and high 20 bits are counted: two changes that cancel are as rare as by chance.
    """
    trials = 20_000
    chance = np.random.default_rng(10)
    words = chance.integers(0, 2**64, (trials, 2), np.uint64)
    places = chance.integers(0, 2**21, (trials, 2), np.uint64)
    places[:, 1] += places[:, 0] == places[:, 1]

    def mixed(values: np.ndarray, at: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            word = values ^ ((at + np.uint64(1)) * np.uint64(KEY))
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))

    assert int(mixed(words[:1, 0], places[:1, 0])[0]) == mix(int(words[0, 0]) ^ ((int(places[0, 0]) + 1) * KEY & MASK))
    for bit in (0, 1, 15, 31, 32, 47, 62, 63):
        flip = np.uint64(1 << bit)
        with np.errstate(over="ignore"):
            change = (mixed(words ^ flip, places) - mixed(words, places)).sum(axis=1, dtype=np.uint64)
        assert not (change == 0).any()
        for few in (change & np.uint64(0xFFFFF), change >> np.uint64(44)):
            assert (few == 0).sum() <= 4  # 0.02 are to be expected


def test_places_count() -> None:
    chance = random.Random(11)
    blocks = [chance.randbytes(4096) for _ in range(16)]
    right = mixsum_64(b"".join(blocks))
    seen = {right}
    for first in range(16):
        for second in range(first):
            swapped = blocks.copy()
            swapped[first], swapped[second] = blocks[second], blocks[first]
            seen.add(mixsum_64(b"".join(swapped)))
        seen.add(mixsum_64(b"".join([*blocks[:first], bytes(4096), *blocks[first + 1 :]])))
        seen.add(mixsum_64(b"".join([*blocks[first:], *blocks[:first]])) if first else right)
    assert len(seen) == 1 + 120 + 16 + 15
    assert len({mixsum_64(bytes(length)) for length in range(1000)}) == 1000
    assert len({mixsum_64(b"\xff" * length) for length in range(1000)}) == 1000


def test_digests_look_like_chance() -> None:
    """Of 2^14 neighbours (one bit apart, or one byte longer), the low 28 bits meet as often as chance has it."""
    digests = [mixsum_64(int(number).to_bytes(8, "little") + bytes(24)) for number in range(2**14)]
    pairs = 2**14 - len({digest & 0xFFFFFFF for digest in digests})
    assert pairs <= 5  # 0.5 are to be expected
    ones = sum(digest.bit_count() for digest in digests) / 2**14
    assert 31.8 < ones < 32.2


@pytest.mark.usefixtures("_width")
def test_a_large_buffer_is_the_same_in_every_loop() -> None:
    with HostBuffer(1 << 20) as buffer:
        view = np.frombuffer(buffer, np.uint8)
        view[:] = np.frombuffer(random.Random(12).randbytes(1 << 20), np.uint8)
        assert mixsum_64(view) == 0x3C4DE43EAEE70BEF  # by `definition`, which takes a second
        assert mixsum_64(view[3:-2]) == definition(view[3:-2].tobytes())
        del view
