"""The outcome of all runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts over runs. `bytes_again`: of a receiver, in models; `notice_seconds`: from a fault to its log line."""

    runs: int = 0
    unfinished: int = 0
    engines_lost: int = 0
    wrong_weights: int = 0
    from_storage: int = 0
    bytes_again: list[float] = field(default_factory=list)
    notice_seconds: list[float] = field(default_factory=list)
    by_fault: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The result as a bench's flat map."""
        again = self.bytes_again or [0.0]
        return {
            "runs": self.runs,
            "unfinished": self.unfinished,
            "engines_lost": self.engines_lost,
            "wrong_weights": self.wrong_weights,
            "resent_ratio": round(sum(again) / len(again), 4),
            "most_resent_ratio": round(max(again), 4),
            "max_notice_seconds": round(max(self.notice_seconds, default=0.0), 2),
            "notices": len(self.notice_seconds),
            "loads_from_storage": self.from_storage,
            "kills_of_a_target_with_a_stalled_source": sum(
                count for fault, count in self.by_fault.items() if fault == STALLED
            ),
        }


STALLED: str = "kill a target while its source is stalled"
