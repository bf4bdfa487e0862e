"""Digests of memory, XXH3-64 and mixsum-64, compiled (docs/reference/digests.md)."""

from __future__ import annotations

from mxcore.digest.digest import mixsum_64_many, xxh3_64, xxh3_64_many, xxh3_64_segments

__all__ = ["mixsum_64_many", "xxh3_64", "xxh3_64_many", "xxh3_64_segments"]
