"""What compiled functions take as a list of addresses or lengths."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Uint64Buffer"]


class Uint64Buffer(Protocol):
    """A contiguous buffer of uint64: `array.array("Q")`, a numpy uint64 array, a cast memoryview."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
