"""Bytes of cached files by HTTP/1.1 ranges, over a port and in threads of their own."""

from __future__ import annotations

from mxserver.files_port.server import FilesPort

__all__ = ["FilesPort"]
