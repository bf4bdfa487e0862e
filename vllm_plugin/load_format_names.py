"""The names that `--load-format` takes for us, and those of our weight transfer engine."""

from __future__ import annotations

__all__ = ["LOAD_FORMATS", "TRANSFER_BACKENDS"]

LOAD_FORMATS = ("mx", "mx-source", "mx-target", "modelexpress")
"""The last one only where NVIDIA's package of that name is not installed."""

TRANSFER_BACKENDS = ("mx", "modelexpress")
"""As the load formats."""
