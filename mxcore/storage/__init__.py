"""Weights from storage: checkpoints in folders, object stores, the server's model cache."""

from __future__ import annotations
