"""Tensors from process to process without an engine: published under a name and a version, and fetched."""

from __future__ import annotations

from mxcore.exchange.fetching import Fetched, fetch
from mxcore.exchange.held_version import HeldVersion, PublishedVersion
from mxcore.exchange.publishing import Published, publish

__all__ = ["Fetched", "HeldVersion", "Published", "PublishedVersion", "fetch", "publish"]
