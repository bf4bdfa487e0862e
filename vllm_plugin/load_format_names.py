"""The names that `--load-format` takes for us."""

from __future__ import annotations

__all__ = ["LOAD_FORMATS"]

LOAD_FORMATS = ("mx", "mx-source", "mx-target", "modelexpress")
"""The last one only where NVIDIA's package of that name is not installed."""
