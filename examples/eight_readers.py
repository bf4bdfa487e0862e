"""Eight processes fetch at once, each gives the others what it has: python examples/eight_readers.py NAME VERSION."""

import multiprocessing
import sys
from multiprocessing.synchronize import Barrier

from mxcore import fetch

READERS = 8


def read(name: str, version: str, everybody: Barrier) -> None:
    """One reader; it stays until all have everything, so that late ones can take from it."""
    with fetch(name, version, wait_seconds=60, share=True, framework="numpy") as weights:
        everybody.wait()
        given = dict(weights.report.bytes_from)
    said = f"{len(weights)} tensors, {weights.report.bytes} bytes from {len(given)} processes: {given}\n"
    sys.stdout.write(said)  # line and end in one piece: eight processes write to the same place
    sys.stdout.flush()


if __name__ == "__main__":
    start = multiprocessing.get_context("spawn")  # never fork a process that has called mxcore
    barrier = start.Barrier(READERS)
    readers = [start.Process(target=read, args=(*sys.argv[1:], barrier)) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    sys.exit(any(reader.exitcode for reader in readers))
