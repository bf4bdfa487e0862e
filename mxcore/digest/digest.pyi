"""XXH3-64 and mixsum-64 over buffers and over raw memory, compiled.

XXH3: 64 bits, default secret, as in xxHash 0.8 (third_party/xxhash). mixsum-64: ours, for a GPU's thousands of threads
(mixsum.h, docs/reference/digests.md); from the host's memory it is as fast. Neither is cryptographic. Digests are the
same on every processor. All functions release the GIL for what takes longer than that costs, and may be called from
several threads at once. Memory that is written to meanwhile gives a digest of no use, and nothing worse.

Where a function takes `addresses` and `lengths`, each is a one-dimensional, C-contiguous buffer of native uint64
(array.array("Q"), numpy) or a sequence of integers: byte addresses of host memory of this process, and bytes. The
memory is the caller's to keep alive; a wrong address crashes the process. Segments of length 0 may have any address.
"""

from collections.abc import Sequence

from typing_extensions import Buffer

def xxh3_64(data: Buffer, seed: int = 0) -> int:
    """The digest of a C-contiguous buffer (any shape and format, as bytes), as an unsigned 64-bit integer.

    Raises BufferError for a buffer that is not contiguous, TypeError for no buffer, OverflowError for a seed that is
    no unsigned 64-bit integer.
    """

def xxh3_64_segments(addresses: Buffer | Sequence[int], lengths: Buffer | Sequence[int]) -> int:
    """The digest of several stretches of memory as if they were one, in the order given.

    Raises ValueError for arrays of different length and for a segment at address 0 or past the end of the address
    space, TypeError for other formats.
    """

def xxh3_64_many(
    addresses: Buffer | Sequence[int],
    lengths: Buffer | Sequence[int],
    segment_starts: Buffer | Sequence[int],
    *,
    threads: int = 1,
) -> bytes:
    """One digest a group of segments, 8 bytes little-endian each, in the order of the groups.

    `segment_starts` has one value more than there are groups: group i has the segments from `segment_starts[i]` up to
    `segment_starts[i + 1]`, the first value is 0, the last the number of segments. A group may be empty. `threads`
    (1 to 64) threads share the groups.

    Raises as `xxh3_64_segments`, and ValueError for `segment_starts` or `threads` that are not as said.
    """

def mixsum_64(data: Buffer) -> int:
    """mixsum-64 of a C-contiguous buffer (any shape and format, as bytes). Raises BufferError, TypeError."""

def mixsum_64_segments(addresses: Buffer | Sequence[int], lengths: Buffer | Sequence[int]) -> int:
    """As `xxh3_64_segments`."""

def mixsum_64_many(
    addresses: Buffer | Sequence[int],
    lengths: Buffer | Sequence[int],
    segment_starts: Buffer | Sequence[int],
    *,
    threads: int = 1,
) -> bytes:
    """As `xxh3_64_many`."""

def _choose_vectors(widest: int) -> int:
    """For tests: allows vectors up to 0 (the baseline's), 1 (AVX2), 2 (AVX-512); returns what is used."""

def _choose_mixsum_vectors(widest: int) -> int:
    """For tests: as `_choose_vectors`."""
