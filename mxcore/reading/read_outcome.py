"""What the compiled reader says about a read."""

from __future__ import annotations

from array import array
from typing import TypedDict

__all__ = ["Outcome"]


class Outcome(TypedDict):
    """`done_bytes` reached destinations, `read_bytes` came from files. `fell_back`: reads that O_DIRECT refused.

    `register_error` and `setup_error` are the errno of what io_uring could not do, 0 if nothing. `seconds` and `bytes`
    are those of all threads by `way` and by `other_way`. `straight_bytes` of them all came by cuFile; `left` are jobs
    (int64) that it failed on: nothing else is missing, and they are to be read again when its handles are closed.
    """

    straight_bytes: int
    left: array[int]

    done_bytes: int
    read_bytes: int
    fell_back: int
    register_error: int
    setup_error: int
    seconds: tuple[float, float]
    bytes: tuple[int, int]
