"""Digests of memory, XXH3-64 and mixsum-64, compiled (docs/digests.md)."""
