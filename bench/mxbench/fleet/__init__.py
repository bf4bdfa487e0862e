"""Fleets of real processes on one machine or many: a server, workers with made-up models; a simulator of large ones."""

from __future__ import annotations

from mxbench.fleet.shapes import SHAPES, Shape, scaled, total_bytes

__all__ = ["SHAPES", "Shape", "scaled", "total_bytes"]
