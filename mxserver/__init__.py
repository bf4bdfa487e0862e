"""The server: which worker has which weights, and how far loads have come. It uses neither torch nor an engine."""

from __future__ import annotations

__version__ = "0.1.0"
