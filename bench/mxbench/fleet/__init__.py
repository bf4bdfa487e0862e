"""A fleet's processes that need nothing but the wheel: the server, and workers that hold or receive a made-up model."""

from __future__ import annotations

from mxbench.fleet.shapes import SHAPES, Shape, scaled, total_bytes

__all__ = ["SHAPES", "Shape", "scaled", "total_bytes"]
