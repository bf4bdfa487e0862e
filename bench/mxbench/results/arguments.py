"""Options, and kinds of arguments, that several benches take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

__all__ = ["NewFile", "json_option", "mib_option", "rounds_option"]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def rounds_option(default: int, help_text: str, *, most: int | None = None) -> Decorator:
    """`--rounds`: how often everything is measured."""
    return click.option("--rounds", type=click.IntRange(1, most), default=default, show_default=True, help=help_text)


def mib_option(default: int, help_text: str, *, least: int = 1) -> Decorator:
    """`--mib`: the size of a model."""
    return click.option("--mib", type=click.IntRange(least), default=default, show_default=True, help=help_text)


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
