"""Workers that wait: who reads storage for them, and what they are told of those who have weights."""

from __future__ import annotations

from mxserver.waiting.elections import ElectionKey, StorageElections
from mxserver.waiting.nearest import nearest, reference
from mxserver.waiting.watches import TooManyWatches, Watches

__all__ = ["ElectionKey", "StorageElections", "TooManyWatches", "Watches", "nearest", "reference"]
