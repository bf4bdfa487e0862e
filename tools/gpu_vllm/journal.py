"""Results that survive a cut: each step's is on disk before the next one begins."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

LOG_BYTES = 200_000  # of one process' log, from its end
RESULTS, LOGS = "results.jsonl", "logs.txt"


class Journal:
    """Two files in a folder: a JSON object a line, and the ends of the processes' logs. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._results, self._logs = folder / RESULTS, folder / LOGS
        self._results.write_text("")
        self._logs.write_text("")
        self._started = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def add(self, step: str, **values: Any) -> None:
        """Writes one result and waits until the disk has it."""
        row = {"step": step, "at_seconds": round(self.seconds, 1), **values}
        self.rows.append(row)
        _append(self._results, json.dumps(row) + "\n")

    def keep_logs(self, logs: list[Path]) -> None:
        """Copies the ends of logs."""
        for log in logs:
            end = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
            _append(self._logs, f"===== {log.name}\n{end}\n")

    def table(self) -> str:
        """For people: a line a step."""
        return "\n".join(f"{row['at_seconds']:6.1f} s  {row['step']:18} {_verdict(row)}" for row in self.rows)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _verdict(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if "error" in row:
        return f"FAILED: {str(row['error']).splitlines()[0][:160]}"
    if "ok" not in row:
        return ""
    return "ok" if row["ok"] else f"NOT as it should be: {', '.join(row['wrong'])}"
