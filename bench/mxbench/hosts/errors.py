"""What fails on another machine, or on the way there."""

from __future__ import annotations

__all__ = ["HostError"]


class HostError(RuntimeError):
    """A host was not reached, or a process on it did not do what the bench expected; the message names the host."""
