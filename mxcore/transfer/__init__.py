"""Weights from other workers: layout, routes, moving, receiving, serving, a worker's life in a fleet."""

from __future__ import annotations
