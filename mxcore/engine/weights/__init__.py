"""What of an engine's model is a weight, how the model is made, and what of it is received and offered."""

from __future__ import annotations

from mxcore.engine.weights.constructed import Constructed, Staged
from mxcore.engine.weights.evidence import Built
from mxcore.engine.weights.offered import Fit, Kind, Weights, synchronize
from mxcore.engine.weights.uninitialised import MarkUninitialised

__all__ = ["Built", "Constructed", "Fit", "Kind", "MarkUninitialised", "Staged", "Weights", "synchronize"]
