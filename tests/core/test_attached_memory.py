"""Reading another process' memory: every byte, the digest of what arrived, and each way in which it cannot be done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcore.attached_memory import read_attached
from mxcore.digest import xxh3_64, xxh3_64_many

PIECE_BYTES = 512 * 1024  # of one call of the kernel

HOLDER = """
import ctypes, sys
memory = ctypes.create_string_buffer(bytes(range(256)) * 8192, 256 * 8192)
print(ctypes.addressof(memory), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("length", [1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 256 * 8192])
def test_bytes_of_another_process_and_their_digest(length: int) -> None:
    here = np.zeros(length + 1, np.uint8)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        there = int(holder.stdout.readline())
        digest = read_attached(holder.pid, [here.ctypes.data], [there], [length])
        holder.communicate("")
    expected = np.resize(np.arange(256, dtype=np.uint8), length)
    assert (here[:length] == expected).all()
    assert here[length] == 0  # nothing beyond
    assert digest == xxh3_64(expected).to_bytes(8, "little")
    with pytest.raises(ProcessLookupError):
        read_attached(holder.pid, [here.ctypes.data], [there], [length])


stretches = st.lists(
    st.tuples(st.sampled_from([0, 1, 63, 5000, PIECE_BYTES - 7, PIECE_BYTES + 9]), st.sampled_from([0, 1, 64])),
    min_size=1,
    max_size=300,
)


@settings(deadline=None, max_examples=40)
@given(stretches, st.booleans())
def test_any_stretches_of_memory(parts: list[tuple[int, int]], hashed: bool) -> None:
    """Of this process: to the kernel it is one as any other."""
    total = sum(length + gap for length, gap in parts)
    source = np.random.default_rng(total).integers(1, 256, total + 1, np.uint8)
    target = np.zeros(total + 1, np.uint8)
    offsets, lengths, expected, at = [], [], np.zeros(total + 1, np.uint8), 0
    for length, gap in parts:
        offsets.append(at)
        lengths.append(length)
        expected[at : at + length] = source[at : at + length]
        at += length + gap
    here = array("Q", (int(target.ctypes.data) + offset for offset in offsets))
    there = array("Q", (int(source.ctypes.data) + offset for offset in offsets))
    digest = read_attached(os.getpid(), here, there, array("Q", lengths), hashed=hashed)
    assert (target == expected).all()
    assert digest == (xxh3_64_many(here, lengths, [0, len(lengths)]) if hashed else b"")


@pytest.mark.parametrize("broken", ["there", "here", "the second there"])
def test_memory_that_is_not_mapped(broken: str) -> None:
    source, target = np.ones(16, np.uint8), np.zeros(16, np.uint8)
    nowhere = 0x1000  # below what the kernel lets anybody map
    here = [nowhere if broken == "here" else target.ctypes.data, target.ctypes.data + 8]
    there = [nowhere if broken == "there" else source.ctypes.data, source.ctypes.data + 8]
    if broken == "the second there":
        there[1] = nowhere
    with pytest.raises(OSError, match="address") as raised:
        read_attached(os.getpid(), here, there, [8, 8])
    assert raised.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("pid", "local", "remote", "lengths", "said"),
    [
        (0, [1], [1], [1], "no process"),
        (-1, [1], [1], [1], "no process"),
        (1, [1, 2], [1], [1], "2 local and 1 remote"),
        (1, [1], [1], [1, 2], "2 lengths"),
        (1, [], [], [], "no digest"),
    ],
)
def test_what_is_no_read_is_refused(
    pid: int, local: list[int], remote: list[int], lengths: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_attached(pid, local, remote, lengths)


def test_nothing_is_read_and_not_hashed() -> None:
    assert read_attached(os.getpid(), [], [], [], hashed=False) == b""
