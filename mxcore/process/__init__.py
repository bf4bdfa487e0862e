"""This process' C environment and collector of garbage, and the memory of other processes on this host."""

from __future__ import annotations

from mxcore.process.attached_memory import AttachedReads, allow_attaching, read_attached
from mxcore.process.c_environment import c_getenv, c_setenv
from mxcore.process.collection import collection_paused

__all__ = ["AttachedReads", "allow_attaching", "c_getenv", "c_setenv", "collection_paused", "read_attached"]
