"""What a load did, for people (one line in the log) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mxcore.transfer.receive.receiver import ReceiveReport

StoredPath = Literal["uri", "cache", "storage"]


@dataclass
class LoadReport:
    """One load of one worker. Byte counts are those of the weights; seconds are of the part that `path` names.

    `path` is where the weights came from: "p2p" from other workers, "uri" from MX_MODEL_URI, "cache" from the server's
    model cache, "storage" from files by vLLM's default loader. `paths` is what became of each rung of the ladder
    (mxcore.load_ladder.Step), `bytes_from_storage` what was read for chunks that no worker could give any more (path
    "p2p"), `steps` the seconds of the load's parts (join, fill, keep, offer; build and process are the engine's),
    `fallbacks` one line for everything that did not go as wanted, in order.
    """

    model: str
    rank: int = 0
    path: Literal["p2p", "uri", "cache", "storage"] = "storage"
    layout: str = ""
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    chunks_verified: int = 0
    bytes_from_storage: int = 0
    source_worker: str = ""
    operation: str = ""
    transport: str = ""
    serving: bool = False
    source_id: str = ""
    worker_id: str = ""
    offers: list[dict[str, str]] = field(default_factory=list)
    load_seconds: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    paths: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def tell_received(self, received: ReceiveReport) -> None:
        """A transfer from other workers succeeded."""
        self.tensors = received.tensors
        self.bytes = received.bytes
        self.seconds = received.seconds
        self.chunks_verified = received.chunks_verified
        self.source_worker = received.source_worker_id
        self.operation = received.operation
        self.transport = received.transport

    def tell_offer(self, layout: str, source_id: str, worker_id: str) -> None:
        """Weights of one kind are served; the first ones are those that `source_id` and `worker_id` name."""
        if not self.serving:
            self.serving, self.source_id, self.worker_id = True, source_id, worker_id
        self.offers.append({"layout": layout, "source_id": source_id, "worker_id": worker_id})

    def forget(self) -> None:
        """What was told of a model that is given up after all."""
        self.path = "storage"
        self.tensors = self.bytes = self.chunks_verified = self.bytes_from_storage = 0
        self.seconds = 0.0
        self.steps = {step: seconds for step, seconds in self.steps.items() if step == "join"}
        self.source_worker = self.operation = self.transport = ""

    @property
    def gigabytes_per_second(self) -> float:
        """10⁹ bytes a second; 0 when nothing was measured."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields, and the rate."""
        return {**dataclasses.asdict(self), "gigabytes_per_second": round(self.gigabytes_per_second, 4)}

    def line(self) -> str:
        """The one line for the log."""
        how = f"from worker {self.source_worker} ({self.transport}, {self.operation})" if self.path == "p2p" else ""
        rate = f"{self.bytes} bytes in {self.seconds:.3f} s ({self.gigabytes_per_second:.2f} GB/s)"
        counted = [f"{self.tensors} tensors", rate] if self.tensors else [f"{self.seconds:.3f} s"]  # else nobody looked
        parts = [
            f"{self.model} rank {self.rank}: {self.path} {how}".rstrip(),
            *counted,
            *([f"{self.chunks_verified} chunks verified"] if self.path == "p2p" else []),
            *([f"{self.bytes_from_storage} bytes read from storage"] if self.bytes_from_storage else []),
            f"layout {self.layout or 'none'}",
            f"serving as {self.worker_id}" if self.serving else "not serving",
            f"paths: {', '.join('{rung} {outcome}'.format(**step) for step in self.paths) or 'none'}",
            f"fallbacks: {'; '.join(self.fallbacks)}" if self.fallbacks else "no fallbacks",
        ]
        return ", ".join(parts)

    def write(self, path: str) -> None:
        """Writes the JSON beside `path` and renames it, so that a reader finds all or nothing.

        `{rank}` in the path stands for the rank; without it, ranks above 0 get `.rank<n>` appended. Raises OSError.
        """
        target = Path(path.replace("{rank}", str(self.rank)))
        if self.rank and "{rank}" not in path:
            target = target.with_name(f"{target.name}.rank{self.rank}")
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        beside.replace(target)
