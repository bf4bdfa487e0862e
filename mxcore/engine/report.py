"""What a load did, for people (one line in the log) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mxserver.wire import MxError, unique_beside

__all__ = ["Fallbacks", "LoadReport", "LoadedPart", "StepSeconds", "StoredPath"]

StoredPath: TypeAlias = Literal["p2p", "uri", "cache", "storage"]

_log = logging.getLogger(__name__)


class Fallbacks(list[str]):
    """A line for everything of a load that did not go as wanted, in order."""

    @contextmanager
    def attempt(self, what: str, failed: Callable[[Exception], None] = lambda error: None) -> Iterator[None]:
        """Around a part of ours beside the rungs: what it raises ends the block, and is a line here and in the log.

        `failed` is told what it was.
        """
        try:
            yield
        except MxError as error:
            failed(error)
            self.append(f"{what}: {error}")
            _log.warning("%s failed: %s", what, error)
        except Exception as error:  # noqa: BLE001 - the engine must start; the log has the traceback
            failed(error)
            self.append(f"{what}: {type(error).__name__}: {error}")
            _log.exception("%s failed by a fault of ours (please report it); the engine goes on without it", what)


class StepSeconds(dict[str, float]):
    """Seconds of a load's steps, by name, in order."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around a step, whose seconds are added."""
        began = time.monotonic()
        try:
            yield
        finally:
            self[name] = round(self.get(name, 0.0) + time.monotonic() - began, 6)


@dataclass(frozen=True, kw_only=True)
class LoadedPart:
    """The part of a report that the rung knows which gave the model.

    Byte counts are those of the weights; `seconds` are of the part that `path` names: "p2p" from other workers, "uri"
    from MX_MODEL_URI, "cache" from the server's model cache, "storage" from files by the engine's own loader.
    `bytes_from_storage` was read for chunks that no worker could give any more (path "p2p").
    """

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
    steps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadReport(LoadedPart):
    """One load of one worker.

    `part_of_engine` is "draft" for a draft, whose report is written beside the model's, as `<report_path>.draft`.
    `paths` is what became of each rung of the ladder (mxcore.load_ladder.Step), `offers` what is served, the first of
    it under `source_id` and `worker_id`, `steps` the seconds of the load's parts (join, fill, keep, offer; build and
    process are the engine's), `fallbacks` one line for everything that did not go as wanted, in order, `checkpoint` the
    digest of what was loaded, where that is known. `refusals` counts weights that are not shared, by side ("offer",
    "receive") and reason (load.proto).
    """

    model: str
    part_of_engine: str = ""
    rank: int = 0
    serving: bool = False
    source_id: str = ""
    worker_id: str = ""
    offers: Sequence[Mapping[str, str]] = ()
    load_seconds: float = 0.0
    paths: Sequence[Mapping[str, Any]] = ()
    fallbacks: Sequence[str] = ()
    checkpoint: str = ""
    refusals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        """10⁹ bytes a second; 0 when nothing was measured."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields, and the rate."""
        first = {"model": self.model, "rank": self.rank}
        return {**first, **dataclasses.asdict(self), "gigabytes_per_second": round(self.gigabytes_per_second, 4)}

    def line(self) -> str:
        """The one line for the log."""
        how = f"from worker {self.source_worker} ({self.transport}, {self.operation})" if self.path == "p2p" else ""
        rate = f"{self.bytes} bytes in {self.seconds:.3f} s ({self.gigabytes_per_second:.2f} GB/s)"
        part = f" ({self.part_of_engine})" if self.part_of_engine else ""
        counted = [f"{self.tensors} tensors", rate] if self.tensors else [f"{self.seconds:.3f} s"]  # else nobody looked
        parts = [
            f"{self.model}{part} rank {self.rank}: {self.path} {how}".rstrip(),
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
        beside = unique_beside(target)
        beside.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        beside.replace(target)
