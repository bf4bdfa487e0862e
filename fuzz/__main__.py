"""Mutates the corpus and gives it to the header parser and to the reader, in every way to read.

    make fuzz SECONDS=60

Whatever the bytes are, the parser raises a SafetensorsError or returns a header that covers the file; a file it took
is then read, and read again after it was cut short: the bytes are those of the file, or it is a StorageError. Anything
else (another exception, a sanitizer's report, a crash) ends the run, with the input in `fuzz/findings`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import sys
import tempfile
import time
from array import array
from pathlib import Path

from fuzz.make_corpus import CORPUS, FOLDERS
from mxcore.errors import StorageError
from mxcore.memory import HostBuffer
from mxcore.reading import FileSet, JobList, checkpoint_reader
from mxcore.safetensors import SafetensorsError, parse_header, read_header

TOKENS = [
    b'"data_offsets"', b'"shape"', b'"dtype"', b'"BF16"', b'"F4"', b'"__metadata__"', b"[0,0]", b"18446744073709551615",
    b"9223372036854775808", b"-1", b"1e5", b"\\ud800", b"\\u0000", b"\xff", b"{", b"}", b"[", b"]", b'"', b",", b":",
    b" ",
]  # fmt: skip
WAYS = (checkpoint_reader.BUFFERED, checkpoint_reader.MAPPED, checkpoint_reader.DIRECT, checkpoint_reader.URING)


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to eight edits; half of the time the length is put right, so that they reach what is behind it."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randint(0, len(out))
        match chance.randint(0, 6):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randint(0, 7)
            case 1:
                del out[at : at + chance.randint(1, 12)]
            case 2:
                out[at:at] = chance.choice(TOKENS)
            case 3:
                out[at:at] = out[chance.randint(0, len(out)) :][: chance.randint(1, 40)]
            case 4:
                other = chance.choice(others)
                out[at:] = other[chance.randint(0, len(other)) :]
            case 5:
                out[at : at + 1] = str(chance.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1])).encode()
            case _:
                out += bytes(chance.randint(0, 64))
    if chance.random() < 0.5 and len(out) > 8:
        end = out.rfind(b"}") + 1
        out[:8] = max(0, end - 8).to_bytes(8, "little")
    return bytes(out)


def check_parser(data: bytes) -> bool:
    """Whether it is a file of ours."""
    try:
        header = parse_header(data, len(data))
    except SafetensorsError:
        return False
    covered = sum(entry.size_bytes for entry in header.tensors)
    if header.data_offset + covered != len(data):
        raise AssertionError(f"the tensors cover {covered} bytes of {len(data) - header.data_offset}")
    return True


def check_reader(file: Path, data: bytes, chance: random.Random, memory: HostBuffer, slots: HostBuffer) -> None:
    """Reads all tensors, whole or as runs; the second time from a file that was cut short meanwhile."""
    file.write_bytes(data)
    header = read_header(file)
    parts, expected, at = array("q"), [], 0
    for entry in header.tensors:
        begin, size = header.data_offset + entry.begin, entry.size_bytes
        if not 0 < size <= memory.size_bytes - at:
            continue
        run = chance.choice([d for d in (1, 2, 3, size) if size % d == 0])
        skip = chance.randint(1, 3)
        count = 1 if run == size else -(-(size // run) // skip)
        parts.extend((0, begin, run, run * skip if count > 1 else 0, count, memory.address + at, run))
        expected.append((at, b"".join(data[begin + i * run * skip :][:run] for i in range(count))))
        at += run * count
    with FileSet([file]) as files:
        jobs = JobList(files, parts, piece_bytes=4096, gap_bytes=chance.choice([0, 100, 1 << 20]))
        files.map(0)
        files.open_direct(0)
        order = array("q", range(len(jobs)))
        for way in WAYS:
            lanes = 2 if way >= checkpoint_reader.DIRECT else 1
            checkpoint_reader.read_jobs(jobs, order, way=way, threads=1, lanes=lanes, slots=slots)
            if any(bytes(memoryview(memory)[at : at + len(want)]) != want for at, want in expected):
                raise AssertionError(f"way {way} read other bytes than the file has")
        if order:
            os.truncate(file, chance.randint(0, len(data) - 1))
            with contextlib.suppress(StorageError):
                checkpoint_reader.read_jobs(jobs, order, way=chance.choice(WAYS), lanes=1, slots=slots)


def main() -> None:
    """Runs for a while; 1 and the input's place if something was found."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--seed", type=int, default=None)
    chosen = arguments.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    faulthandler.enable()
    seeds = [file.read_bytes() for folder in FOLDERS for file in sorted((CORPUS / folder).iterdir())]
    findings = Path(__file__).parent / "findings"
    taken = tried = 0
    end = time.monotonic() + chosen.seconds
    with tempfile.TemporaryDirectory() as place, HostBuffer(1 << 20) as memory, HostBuffer(1 << 20) as slots:
        last = Path(place) / "input"
        while time.monotonic() < end:
            data = mutated(chance.choice(seeds), seeds, chance)
            tried += 1
            try:
                if check_parser(data):
                    taken += 1
                    check_reader(last, data, chance, memory, slots)
                    if len(seeds) < 2000 and len(data) < 4096:
                        seeds.append(data)
            except BaseException:
                findings.mkdir(exist_ok=True)
                (findings / f"{seed}-{tried}.safetensors").write_bytes(data)
                print(f"found with seed {seed}, input {tried}: {findings}", file=sys.stderr)
                raise
    print(f"seed {seed}: {tried} inputs, {taken} of them taken and read in {len(WAYS)} ways; nothing found")


if __name__ == "__main__":
    main()
