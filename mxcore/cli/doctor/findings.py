"""What `mx doctor` finds: one line of fact, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "note", "warn", "fail"]
"""ok: works. note: is not there and need not be. warn: works, but worse than it could. fail: a worker will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `do` is what to do next; empty where there is nothing to do."""

    name: str
    state: State
    fact: str
    do: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def failed(findings: list[Finding]) -> bool:
    return any(finding.state == "fail" for finding in findings)
