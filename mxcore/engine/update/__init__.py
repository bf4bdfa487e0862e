"""New weights for a model that runs: staged beside it or taken straight into its memory, all of them or none."""

from __future__ import annotations

from mxcore.engine.update.replacement import Replacement
from mxcore.engine.update.running import Running, forget, load_running, running_of
from mxcore.engine.update.updating import has_version, restore, update

__all__ = ["Replacement", "Running", "forget", "has_version", "load_running", "restore", "running_of", "update"]
