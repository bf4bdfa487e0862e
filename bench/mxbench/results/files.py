"""Results as files: one document, or a folder of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["Documents", "read_documents"]

Documents = dict[str, dict[str, Any]]
"""Name → document. A file has one; its name is empty. In a folder it is the file's path without its ending."""


def read_documents(path: Path) -> Documents:
    """The documents with `figures` in a file or below a folder. Raises click.UsageError where there is none."""
    if path.is_file():
        found = _document(path)
        if found is None:
            raise click.UsageError(f"{path} is no result of a bench: no JSON object with `figures`")
        return {"": found}
    documents = {}
    for file in sorted(path.rglob("*.json")):
        if (found := _document(file)) is not None:
            documents[str(file.relative_to(path).with_suffix(""))] = found
    if not documents:
        raise click.UsageError(f"{path} has no result of a bench: no .json with `figures` in it or below")
    return documents


def _document(file: Path) -> dict[str, Any] | None:
    try:
        text = file.read_text()
        found = json.loads(text)
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(figures := found.get("figures"), dict):
        return None
    return found if all(_is_number(value) for value in figures.values()) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
