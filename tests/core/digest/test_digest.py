"""XXH3-64 against the values of xxHash's own sanity check, over buffers, segments and groups."""

from __future__ import annotations

import array
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mxcore.digest import xxh3_64, xxh3_64_many, xxh3_64_segments
from mxcore.digest.digest import _choose_vectors
from mxcore.memory import HostBuffer

PRIME32 = 2654435761
PRIME64 = 11400714785074694797


def sanity_bytes(length: int) -> bytes:
    """The input of xxHash's sanity check (tests/sanity_test.c)."""
    state, out = PRIME32, bytearray()
    for _ in range(length):
        out.append(state >> 56)
        state = state * PRIME64 % 2**64
    return bytes(out)


DATA = sanity_bytes(2400)

# (length, seed, XXH3_64bits_withSeed), from xxHash 0.8's sanity check: each of its branches by length
VECTORS = [
    (0, 0, 0x2D06800538D394C2), (0, PRIME64, 0xA8A6B918B2F0364A),
    (1, 0, 0xC44BDFF4074EECDB), (1, PRIME64, 0x032BE332DD766EF8),
    (6, 0, 0x27B56A84CD2D7325), (6, PRIME64, 0x84589C116AB59AB9),
    (12, 0, 0xA713DAF0DFBB77E7), (12, PRIME64, 0xE7303E1B2336DE0E),
    (24, 0, 0xA3FE70BF9D3510EB), (24, PRIME64, 0x850E80FC35BDD690),
    (48, 0, 0x397DA259ECBA1F11), (48, PRIME64, 0xADC2CBAA44ACC616),
    (80, 0, 0xBCDEFBBB2C47C90A), (80, PRIME64, 0xC6DD0CB699532E73),
    (195, 0, 0xCD94217EE362EC3A), (195, PRIME64, 0xBA68003D370CB3D9),
    (403, 0, 0xCDEB804D65C6DEA4), (403, PRIME64, 0x6259F6ECFD6443FD),
    (512, 0, 0x617E49599013CB6B), (512, PRIME64, 0x3CE457DE14C27708),
    (2048, 0, 0xDD59E2C3A5F038E0), (2048, PRIME64, 0x66F81670669ABABC),
    (2240, 0, 0x6E73A90539CF2948), (2240, PRIME64, 0x757BA8487D1B5247),
    (2367, 0, 0xCB37AEB9E5D361ED), (2367, PRIME64, 0xD2DB3415B942B42A),
]  # fmt: skip


BASELINE, AVX2, AVX512 = 0, 1, 2
WIDTHS = [width for width in (BASELINE, AVX2, AVX512) if _choose_vectors(width) == width]  # that the processor has
_choose_vectors(AVX512)


@pytest.fixture
def _choice() -> Iterator[None]:
    yield
    _choose_vectors(AVX512)


@pytest.fixture(params=WIDTHS)
def _vectors(request: pytest.FixtureRequest, _choice: None) -> None:
    """Each kernel that can run here."""
    _choose_vectors(request.param)


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize(("length", "seed", "digest"), VECTORS)
def test_known_values(length: int, seed: int, digest: int) -> None:
    assert xxh3_64(DATA[:length], seed) == digest
    shifted = memoryview(bytearray(b"x" + DATA[:length]))[1:]  # at an odd address
    assert xxh3_64(shifted, seed) == digest
    if seed == 0:
        address = np.frombuffer(DATA, np.uint8).ctypes.data
        assert xxh3_64_segments([address], [length]) == digest
        assert xxh3_64_segments([address, address + length // 3], [length // 3, length - length // 3]) == digest
        assert xxh3_64_many([address], [length], [0, 1]) == digest.to_bytes(8, "little")


@pytest.mark.usefixtures("_choice")
def test_all_kernels_agree_on_large_data() -> None:
    data = np.random.default_rng(1).integers(0, 256, 3_000_001, dtype=np.uint8)
    _choose_vectors(BASELINE)
    expected = xxh3_64(data)
    for width in WIDTHS:
        _choose_vectors(width)
        assert xxh3_64(data) == expected
        assert xxh3_64(data, 5) != expected


BLOCK_BYTES = 1024  # after which XXH3 mixes its accumulators; of 16 stripes


@pytest.mark.usefixtures("_choice")
@given(
    blocks=st.integers(0, 40),
    rest=st.sampled_from([0, 1, 63, 64, 65, 200, 255, 256, 257, 511, 960, 1023]),
    cuts=st.lists(
        st.integers(0, 41 * BLOCK_BYTES) | st.builds(int.__mul__, st.integers(0, 41 * 16), st.just(64)), max_size=6
    ),
    shift=st.integers(0, 70),
    filling=st.sampled_from(["chance", "ones", "zeros"]),
)
def test_all_kernels_agree_wherever_memory_begins_and_is_cut(
    blocks: int, rest: int, cuts: list[int], shift: int, filling: str
) -> None:
    """Ends of blocks and stripes at every place of a segment, at every place of a cache line; sums that overflow."""
    length = blocks * BLOCK_BYTES + rest
    values = {"chance": np.random.default_rng(length).integers(0, 256, length + shift + 1, dtype=np.uint8)}
    held = values.get(filling, np.full(length + shift + 1, 255 * (filling == "ones"), np.uint8))
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]
    addresses = [held.ctypes.data + shift + begin for begin in bounds[:-1]]
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    digests = []
    for width in WIDTHS:
        _choose_vectors(width)
        digests += [xxh3_64_segments(addresses, lengths), xxh3_64(held[shift : shift + length])]
    assert digests == [xxhash.xxh3_64_intdigest(held[shift : shift + length])] * len(digests)


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=8))
def test_segments_are_as_one_stretch(data: bytes, cuts: list[int]) -> None:
    """However memory is cut, the digest is that of its bytes one after the other."""
    held = np.frombuffer(data + b"x", np.uint8)
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    addresses = [held.ctypes.data + begin for begin in bounds[:-1]]
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert xxh3_64_segments(addresses, lengths) == xxh3_64(data)


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
def test_many_groups(threads: int) -> None:
    data = np.random.default_rng(2).integers(0, 256, 1 << 20, dtype=np.uint8)
    cuts = np.unique(np.random.default_rng(3).integers(0, len(data), 200))
    bounds = np.concatenate(([0], cuts, [len(data)])).astype(np.uint64)
    addresses, lengths = data.ctypes.data + bounds[:-1], np.diff(bounds)
    starts = np.array([0, 0, 1, 5, 5, 100, len(lengths), len(lengths)], np.uint64)
    digests = xxh3_64_many(addresses, lengths, starts, threads=threads)
    edges = [int(bounds[start]) for start in starts]
    expected = [xxh3_64(data[begin:end]) for begin, end in itertools.pairwise(edges)]
    assert [int.from_bytes(digests[i : i + 8], "little") for i in range(0, len(digests), 8)] == expected
    assert xxh3_64_many([], [], [0], threads=threads) == b""


def test_forms_of_arguments() -> None:
    data = bytes(range(100))
    address = np.frombuffer(data, np.uint8).ctypes.data
    expected = xxh3_64(data)
    for make in (list, tuple, lambda values: array.array("Q", values), lambda values: np.array(values, np.uint64)):
        assert xxh3_64_segments(make([address]), make([100])) == expected
        assert xxh3_64_many(make([address]), make([100]), make([0, 1])) == expected.to_bytes(8, "little")
    assert xxh3_64(np.arange(100, dtype=np.uint8).reshape(10, 10)) == expected
    assert xxh3_64_segments([], []) == xxh3_64(b"")
    assert xxh3_64_segments([0, address], [0, 100]) == expected  # nothing at address 0 is nothing


@pytest.mark.parametrize(
    ("addresses", "lengths", "error", "message"),
    [
        ([1, 2], [1], ValueError, "2 addresses, but 1 lengths"),
        ([0], [1], ValueError, "are no memory"),
        ([2**64 - 1], [1], ValueError, "are no memory"),
        ([1], [2**64 - 1], ValueError, "are no memory"),
        ([-1], [1], OverflowError, None),
        ([1], [2**64], OverflowError, None),
        (["1"], [1], TypeError, None),
        (5, [1], TypeError, None),
        (np.ones(1, np.int64), [1], TypeError, "addresses has to be"),
        ([1], np.ones(1, np.uint32), TypeError, "lengths has to be"),
        (np.ones((1, 1), np.uint64), [1], TypeError, "one-dimensional"),
        (np.ones(4, np.uint64)[::2], [1, 1], (ValueError, BufferError), None),
        (np.ones(1, ">u8"), [1], TypeError, "addresses has to be"),
    ],
)
def test_refused_segments(
    addresses: list[int], lengths: list[int], error: type[Exception] | tuple[type[Exception], ...], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        xxh3_64_segments(addresses, lengths)
    with pytest.raises(error, match=message):
        xxh3_64_many(addresses, lengths, [0, 1])


@pytest.mark.parametrize("starts", [[], [1], [0], [0, 2], [1, 1], [0, 1, 0, 1], [0, 2, 1]])
def test_refused_groups(starts: list[int]) -> None:
    data = np.ones(1, np.uint8)
    with pytest.raises(ValueError, match="segment_starts"):
        xxh3_64_many([data.ctypes.data], [1], starts)


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_refused_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        xxh3_64_many([], [], [0], threads=threads)


def test_refused_buffers() -> None:
    with pytest.raises(TypeError):
        xxh3_64("text")  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError)):
        xxh3_64(np.ones(4, np.uint8)[::2])
    for seed in (-1, 2**64):
        with pytest.raises(OverflowError):
            xxh3_64(b"", seed)


def test_a_buffer_is_held_while_hashed_and_then_given_back() -> None:
    """Other threads run meanwhile, and cannot resize what is being hashed."""
    with HostBuffer(64 << 20) as buffer:
        done = threading.Event()
        seen: set[int] = set()

        def watch() -> None:
            while not done.is_set():
                seen.add(buffer.exports)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            while 1 not in seen:  # only with the GIL released can the watcher see the export
                xxh3_64(buffer)
        finally:
            done.set()
            watcher.join()
        assert buffer.exports == 0


def test_threads_take_no_signals() -> None:
    """They are for the interpreter's own threads, whose calls they interrupt. In a process that has no others."""
    program = """
import ctypes, os, re, signal, sys, threading
from contextlib import suppress
from pathlib import Path
from mxcore.digest.digest import xxh3_64_many

data = (ctypes.c_char * (64 << 20))()
first = ctypes.addressof(data)
addresses, lengths = [first + (index << 20) for index in range(64)], [1 << 20] * 64
known, seen, blocked = set(os.listdir("/proc/self/task")), threading.Event(), []

def hash_again_and_again():
    while not seen.is_set():
        xxh3_64_many(addresses, lengths, range(65), threads=3)

hashing = threading.Thread(target=hash_again_and_again)
hashing.start()
while len(blocked) < 50:
    for task in set(os.listdir("/proc/self/task")) - known - {str(hashing.native_id)}:
        with suppress(OSError):  # it has ended meanwhile
            status = Path(f"/proc/self/task/{task}/status").read_text()
            if not re.search(r"Threads:\\s*0", status):  # of one that has just ended the kernel says no masks
                blocked += [int(mask, 16) for mask in re.findall(r"SigBlk:\\s*(\\w+)", status)]
seen.set()
hashing.join()
sys.exit(not all(mask >> (number - 1) & 1 for mask in blocked for number in (signal.SIGALRM, signal.SIGINT)))
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
