"""The HTTP side of the server: probes, metrics, and the status page."""

from __future__ import annotations

from mxserver.web.cache_view import CacheView
from mxserver.web.http import HttpServer
from mxserver.web.pages import application
from mxserver.web.status import StatusView

__all__ = ["CacheView", "HttpServer", "StatusView", "application"]
