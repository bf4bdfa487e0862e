"""What ends the tool with one line instead of a traceback."""

from __future__ import annotations

__all__ = ["SoftRdmaError"]


class SoftRdmaError(Exception):
    """Something that is needed is not there; the message says what to do."""
