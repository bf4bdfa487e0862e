"""Weights from local files."""

from __future__ import annotations
