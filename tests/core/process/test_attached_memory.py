"""Reading another process' memory: every byte, the digest of what arrived, and each way in which it cannot be done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from array import array
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcore.digest import xxh3_64, xxh3_64_many
from mxcore.process import AttachedReads, read_attached
from tests.transfer.conftest import wait_for

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


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("hashed", [True, False])
def test_chunks_by_threads(threads: int, hashed: bool) -> None:
    chunk_bytes, count = 3 * PIECE_BYTES - 11, 20
    source = np.random.default_rng(threads).integers(1, 256, chunk_bytes * count, np.uint8)
    target = np.zeros(source.size, np.uint8)
    reads = AttachedReads(os.getpid(), threads=threads, hashed=hashed)
    found: dict[int, bytes] = {}
    for chunk in range(count):
        begin = chunk_bytes * chunk
        half = chunk_bytes // 2
        here = [int(target.ctypes.data) + begin, int(target.ctypes.data) + begin + half + 1]
        there = [int(source.ctypes.data) + begin, int(source.ctypes.data) + begin + half + 1]
        reads.ask(2**64 - 1 - chunk, here, there, [half, chunk_bytes - half - 1])  # a byte between them is left out
        if chunk == count // 2:
            found.update({key: digest for key, error, digest in reads.ended() if error == 0})
    while answers := reads.ended():
        found.update({key: digest for key, error, digest in answers if error == 0})
    reads.close()
    left_out = np.arange(count) * chunk_bytes + chunk_bytes // 2
    assert (target[left_out] == 0).all()
    target[left_out] = source[left_out]
    assert (target == source).all()
    chunks = source.reshape(count, chunk_bytes)
    expected = [
        xxh3_64(np.delete(chunk, chunk_bytes // 2)).to_bytes(8, "little") if hashed else b"" for chunk in chunks
    ]
    assert [found[2**64 - 1 - chunk] for chunk in range(count)] == expected


def test_a_chunk_that_cannot_be_read_is_told_and_the_others_come() -> None:
    source, target = np.ones(64, np.uint8), np.zeros(64, np.uint8)
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as gone:
        gone.communicate(b"")
    reads = AttachedReads(os.getpid(), threads=2, hashed=True)
    reads.ask(1, [target.ctypes.data], [0x1000], [8])  # below what the kernel lets anybody map
    reads.ask(2, [target.ctypes.data], [source.ctypes.data], [64])
    found = {}
    while answers := reads.ended():
        found.update({key: (error, digest) for key, error, digest in answers})
    assert found == {1: (errno.EFAULT, b""), 2: (0, xxh3_64(source).to_bytes(8, "little"))}
    reads.close()
    of_the_dead = AttachedReads(gone.pid, threads=1, hashed=True)
    of_the_dead.ask(3, [target.ctypes.data], [source.ctypes.data], [64])
    assert of_the_dead.ended() == [(3, errno.ESRCH, b"")]


def test_nothing_is_written_after_close() -> None:
    """What was not begun is dropped, and who waits for it is told."""
    length, count = 64 * PIECE_BYTES, 8
    source, target = np.full(length, 7, np.uint8), np.zeros(length * count, np.uint8)
    reads = AttachedReads(os.getpid(), threads=1, hashed=True)
    ended: list[list[tuple[int, int, bytes]]] = []

    def wait() -> None:
        while answers := reads.ended():
            ended.append(answers)

    for chunk in range(count):
        reads.ask(chunk, [target.ctypes.data + chunk * length], [source.ctypes.data], [length])
    waiting = threading.Thread(target=wait)
    waiting.start()
    reads.close()
    reads.close()
    after = target.reshape(count, length).sum(axis=1, dtype=np.uint64)
    waiting.join(60)
    assert not waiting.is_alive()
    assert sum(map(len, ended)) <= np.count_nonzero(after)
    assert (target.reshape(count, length).sum(axis=1, dtype=np.uint64) == after).all()
    assert reads.ended() == []
    with pytest.raises(ValueError, match="closed"):
        reads.ask(0, [1], [1], [1])


def test_a_fork_leaves_the_reads_of_its_parent_alone() -> None:
    script = """
import os, sys
from mxcore.process.attached_memory import AttachedReads
memory = bytearray(64)
reads = AttachedReads(os.getpid(), threads=2, hashed=True)
child = os.fork()
if child == 0:
    reads.close()  # would wait for threads that a fork does not have
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
reads.close()
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("ended\n", "")


def readers() -> int:
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # ended meanwhile
            count += (task / "comm").read_text() == "mx-attached\n"
    return count


def test_reads_that_nobody_closed_end_with_their_object() -> None:
    source, target = np.ones(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    reads = AttachedReads(os.getpid(), threads=3, hashed=False)
    wait_for(lambda: readers() == 3)  # each names itself
    reads.ask(0, [target.ctypes.data], [source.ctypes.data], [1 << 20])
    del reads
    wait_for(lambda: readers() == 0)  # joined, and soon out of /proc


@pytest.mark.parametrize(("pid", "threads", "said"), [(0, 1, "no process"), (1, 0, "threads is 0"), (1, 65, "1 to 64")])
def test_threads_that_make_no_sense_are_refused(pid: int, threads: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AttachedReads(pid, threads=threads, hashed=True)


def test_a_chunk_of_nothing_is_refused() -> None:
    reads = AttachedReads(os.getpid(), threads=1, hashed=True)
    with pytest.raises(ValueError, match="no digest"):
        reads.ask(0, [], [], [])
    with pytest.raises(ValueError, match="2 local and 1 remote"):
        reads.ask(0, [1, 2], [1], [1])
    assert reads.ended() == []  # nothing was asked for
    reads.close()
