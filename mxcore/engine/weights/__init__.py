"""What of an engine's model is a weight, how the model is made, and what of it is received and offered."""

from __future__ import annotations

from mxcore.engine.weights.evidence import Built
from mxcore.engine.weights.offered import Fit, Kind, Weights, synchronize
from mxcore.engine.weights.uninitialised import MarkUninitialised

__all__ = ["Built", "Fit", "Kind", "MarkUninitialised", "Weights", "synchronize"]
