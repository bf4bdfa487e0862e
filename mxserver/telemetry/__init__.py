"""What the server tells of itself: metrics, loads, events, measured calls and store."""

from __future__ import annotations

from mxserver.telemetry.definition import Definition
from mxserver.telemetry.doubts import Doubts
from mxserver.telemetry.events import Events, bounded
from mxserver.telemetry.load_history import FinishedLoad, LoadHistory
from mxserver.telemetry.loads import Loads, RunningLoad
from mxserver.telemetry.measured_calls import ObservingInterceptor, call_metrics, telling_status
from mxserver.telemetry.metrics import (
    DEFINITIONS,
    DOUBTS,
    REASONS,
    SIDES,
    STATES,
    CacheObservation,
    Metrics,
    Observation,
    ServerObservation,
)
from mxserver.telemetry.model_metrics import MODEL_DEFINITIONS, WorkersOfModels
from mxserver.telemetry.observed_store import ObservedStore
from mxserver.telemetry.refusals import Refusals

__all__ = [
    "DEFINITIONS",
    "DOUBTS",
    "MODEL_DEFINITIONS",
    "REASONS",
    "SIDES",
    "STATES",
    "CacheObservation",
    "Definition",
    "Doubts",
    "Events",
    "FinishedLoad",
    "LoadHistory",
    "Loads",
    "Metrics",
    "Observation",
    "ObservedStore",
    "ObservingInterceptor",
    "Refusals",
    "RunningLoad",
    "ServerObservation",
    "WorkersOfModels",
    "bounded",
    "call_metrics",
    "telling_status",
]
