"""The gRPC services of the server: thin over the store."""

from __future__ import annotations

from mxserver.services.cache import CacheService
from mxserver.services.draining import DrainInterceptor
from mxserver.services.fleet import FleetService
from mxserver.services.model import ModelService
from mxserver.services.p2p import P2pService, update_waits
from mxserver.services.probe import ProbeService
from mxserver.services.small import ApiService, HealthService
from mxserver.services.standard_health import StandardHealth
from mxserver.services.watch import WatchService

__all__ = [
    "ApiService",
    "CacheService",
    "DrainInterceptor",
    "FleetService",
    "HealthService",
    "ModelService",
    "P2pService",
    "ProbeService",
    "StandardHealth",
    "WatchService",
    "update_waits",
]
