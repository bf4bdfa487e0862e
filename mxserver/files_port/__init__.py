"""Bytes of cached files by HTTP/1.1 ranges, over a port of their own: probes and calls never wait for them."""

from __future__ import annotations

from mxserver.files_port.server import FilesPort

__all__ = ["FilesPort"]
