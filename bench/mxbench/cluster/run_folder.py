"""The folder of a run: what was asked for, a document a step, the result. A run that was cut goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mxserver.wire import unique_beside

__all__ = ["RunFolder"]


class RunFolder:
    """`run.json`, `steps/NAME.json`, `steps/NAME.failed` and `result.json`. Files appear whole or not at all."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        """Makes the folder, or goes on in it. Raises click.UsageError where another run was begun."""
        self.folder = folder
        self._steps = folder / "steps"
        begun = folder / "run.json"
        if begun.is_file():
            if (before := json.loads(begun.read_text())) != json.loads(json.dumps(asked)):
                differs = sorted(name for name in asked | before if asked.get(name) != before.get(name))
                told = f"{folder} has a run with other settings ({', '.join(differs)}): give another folder to --run"
                raise click.UsageError(told)
        elif folder.exists() and any(folder.iterdir()):
            raise click.UsageError(f"{folder} is not empty, and has no run.json of a run to go on with")
        try:
            self._steps.mkdir(parents=True, exist_ok=True)
            _write(begun, asked)
        except OSError as error:
            raise click.UsageError(f"{folder} cannot be written: {error.strerror}") from error

    def step(self, name: str) -> dict[str, Any] | None:
        """The document of a step that has ended well."""
        file = self._steps / f"{name}.json"
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def keep(self, name: str, document: dict[str, Any]) -> None:
        """A step's document."""
        _write(self._steps / f"{name}.json", document)
        (self._steps / f"{name}.failed").unlink(missing_ok=True)

    def failed(self, name: str, why: str) -> None:
        """A step that did not end well; it is tried again when the run goes on."""
        (self._steps / f"{name}.failed").write_text(why + "\n")

    def finish(self, document: dict[str, Any]) -> None:
        """The result."""
        _write(self.folder / "result.json", document)


def _write(file: Path, value: dict[str, Any]) -> None:
    beside = unique_beside(file)
    beside.write_text(json.dumps(value, indent=1))
    beside.replace(file)
