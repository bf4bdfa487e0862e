"""Chunks over TCP connections, compiled: gathered and sent by one side, scattered and hashed by the other."""

from __future__ import annotations

from mxcore.sockets.socket_chunks import ChunkSender, SocketReads

__all__ = ["ChunkSender", "SocketReads"]
