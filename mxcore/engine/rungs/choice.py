"""Which rungs a load tries, in which order."""

from __future__ import annotations

from collections.abc import Callable

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded
from mxcore.engine.rungs.model_uri import UriRung
from mxcore.engine.rungs.own_loader import EngineRung
from mxcore.engine.rungs.peer import FleetRung, PeerRung, RawRung, Tried
from mxcore.engine.rungs.server_cache import CacheRung
from mxcore.engine.rungs.target import TargetRung
from mxcore.load_ladder import Rung

__all__ = ["rungs_of"]

_FROM_WORKERS: dict[str, Callable[[LoadContext, Tried], Rung[Loaded]]] = {"p2p": PeerRung, "fleet": FleetRung}
_FROM_STORAGE: dict[str, Callable[[LoadContext], Rung[Loaded]]] = {
    "uri": UriRung,
    "cache": CacheRung,
    "engine": EngineRung,
}


def rungs_of(context: LoadContext) -> list[Rung[Loaded]]:
    """The rungs of MX_LOAD_PATHS that the role of this load allows, in its order; for a target, the one that waits.

    After the workers that have processed weights come those that have raw ones.
    """
    tried = Tried(context.cannot_receive)
    if not context.role.reads_storage:
        return [TargetRung(context, tried)]
    rungs: list[Rung[Loaded]] = []
    for name in context.settings.load_paths:
        if made := _FROM_STORAGE.get(name):
            rungs.append(made(context))
        elif context.role.pulls:
            rungs.append(_FROM_WORKERS[name](context, tried))
            if name == "p2p" and context.kind == "processed":
                rungs.append(RawRung(context, tried))
    return rungs
