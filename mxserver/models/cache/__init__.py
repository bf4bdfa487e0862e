"""The folder of cached models: what is in it, what goes first, who downloads."""

from __future__ import annotations

from mxserver.models.cache.cache import ModelCache
from mxserver.models.cache.eviction import Limits
from mxserver.models.cache.lease import Lease, SharedLocks

__all__ = ["Lease", "Limits", "ModelCache", "SharedLocks"]
