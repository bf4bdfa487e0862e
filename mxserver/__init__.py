"""The server: who has which weights, and how far along they are. It knows neither torch nor an engine."""

from __future__ import annotations

__version__ = "0.1.0"
