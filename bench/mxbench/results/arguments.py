"""Kinds of arguments that several benches take."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["NewFile"]


class NewFile(click.Path):
    """A file that is written: the folder that it lies in exists."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; a usage error without its folder."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}", param, ctx)
        return path
