"""Weights that this worker does not offer or does not take, by reason: for its report, and for the server to count.

They go out with the next heartbeat or the goodbye. The server shows them; nothing depends on them.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from mxcore.errors import ChunksMissing
from mxserver.wire import MxError
from mxserver.wire.proto import load_pb2

__all__ = ["PendingRefusals", "Refusal", "Side", "refusals_of"]

Side: TypeAlias = Literal["offer", "receive"]
_PREFIX = "REFUSAL_REASON_"
_MOST_PENDING = 32
_LONGEST_TEXT = 500


class Refusal(NamedTuple):
    """`reason` is the name of a load_pb2.RefusalReason in lower case."""

    side: Side
    reason: str
    text: str


def refusals_of(side: Side, error: BaseException) -> list[Refusal]:
    """One for each reason that an error has: of chunks that are missing, what became of the holders."""
    causes = error.failures if isinstance(error, ChunksMissing) and error.failures else (error,)
    return list({reason: Refusal(side, reason, str(cause)) for cause in causes for reason in [_reason(cause)]}.values())


def _reason(error: BaseException) -> str:
    for kind in type(error).__mro__:
        code = vars(kind).get("code", "") if issubclass(kind, MxError) else ""
        name = code.removeprefix("MX_")
        if _PREFIX + name in load_pb2.RefusalReason.keys():  # noqa: SIM118 - the wrapper is no mapping
            return str(name.lower())
    return "other"


class PendingRefusals:
    """What the server has not heard yet; the oldest go where there are too many. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[load_pb2.Refusal] = []

    def add(self, refusals: Iterable[Refusal]) -> None:
        """To be told."""
        made = [
            load_pb2.Refusal(
                id=uuid.uuid4().hex,
                side=load_pb2.RefusalSide.Value(f"REFUSAL_SIDE_{refusal.side.upper()}"),
                reason=load_pb2.RefusalReason.Value(_PREFIX + refusal.reason.upper()),
                text=refusal.text[:_LONGEST_TEXT],
            )
            for refusal in refusals
        ]
        with self._lock:
            self._pending = (self._pending + made)[-_MOST_PENDING:]

    def pending(self) -> list[load_pb2.Refusal]:
        """All of them."""
        with self._lock:
            return list(self._pending)

    def told(self, refusals: Iterable[load_pb2.Refusal]) -> None:
        """The server has heard these."""
        heard = {refusal.id for refusal in refusals}
        with self._lock:
            self._pending = [refusal for refusal in self._pending if refusal.id not in heard]
