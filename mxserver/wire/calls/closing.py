"""The base class of objects that a `with` block closes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self, final


class Closing(ABC):
    """Base of clients and connections: `with` returns the object and calls its `close`, whatever the block raised."""

    @abstractmethod
    def close(self) -> None:
        """Releases what the object holds. Idempotent."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
