"""Prints the entries of a requirements file whose packages are not installed here: an image keeps what it has."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path


def missing(text: str) -> str:
    """Entries (with their hashes, on lines that end in a backslash) of packages that are not there."""
    entries = re.split(r"(?<!\\)\n", text)
    absent = []
    for entry in entries:
        name = re.match(r"[A-Za-z0-9._-]+", entry)
        if name is None:
            continue
        try:
            importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            absent.append(entry + "\n")
    return "".join(absent)


if __name__ == "__main__":
    sys.stdout.write(missing(Path(sys.argv[1]).read_text()))
