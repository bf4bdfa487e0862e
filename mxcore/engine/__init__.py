"""Loading and sharing an engine's models: what needs torch and no engine. An engine is what the Protocol `Engine` asks
for; `load` takes the model's weights from the first place that has them, and serves them. Needs torch; the rest of
mxcore does not, and imports nothing of this.
"""

from __future__ import annotations

from mxcore.engine.context import Role
from mxcore.engine.lazy_tensors import lazy_weights
from mxcore.engine.loading import load
from mxcore.engine.model_files import CheckpointFiles, UriPlace, find_checkpoint, model_name
from mxcore.engine.protocol import Engine, Files, Fill, Source, Streamed
from mxcore.engine.serving import EngineWatch, leave
from mxcore.engine.siblings import gather_over_gloo
from mxcore.engine.update import (
    Replacement,
    Running,
    forget,
    has_version,
    load_running,
    restore,
    running_of,
    update,
)
from mxcore.engine.weights import Kind, Staged, Weights

__all__ = [
    "CheckpointFiles",
    "Engine",
    "EngineWatch",
    "Files",
    "Fill",
    "Kind",
    "Replacement",
    "Role",
    "Running",
    "Source",
    "Staged",
    "Streamed",
    "UriPlace",
    "Weights",
    "find_checkpoint",
    "forget",
    "gather_over_gloo",
    "has_version",
    "lazy_weights",
    "leave",
    "load",
    "load_running",
    "model_name",
    "restore",
    "running_of",
    "update",
]
