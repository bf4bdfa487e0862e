"""Checkpoints of this machine and of object stores, opened and read in one way."""

from __future__ import annotations

from mxcore.storage.access.anywhere import load, load_file, open_checkpoint, stream
from mxcore.storage.access.remote_checkpoint import RemoteCheckpoint

__all__ = ["RemoteCheckpoint", "load", "load_file", "open_checkpoint", "stream"]
