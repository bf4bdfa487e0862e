"""What commands print for people: tables that fit the terminal, amounts, times."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

SHORT_ID_CHARACTERS = 12
_LONG_ID = re.compile(r"[0-9a-f]{16,}")


def short_id(text: str, *, whole: bool = False) -> str:
    """A long hexadecimal id's first characters, as on the status page; anything else, or with `whole`, as it is."""
    return text[:SHORT_ID_CHARACTERS] if not whole and _LONG_ID.fullmatch(text) else text


def terminal_width() -> int | None:
    """Columns of the terminal, or what COLUMNS says; None where the output goes elsewhere and nothing has to fit."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None, may_shrink: Collection[str] = ()
) -> str:
    """Columns as wide as they must be, two blanks between them.

    Where that is more than `width`, the columns named in `may_shrink` lose the middle of their longest cells (…), the
    widest first, down to 12 characters each.
    """
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shrinking = [column for column, name in enumerate(head) if name in may_shrink]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(shrinking, key=lambda column: widths[column], default=None)
        if widest is None or widths[widest] <= SHORT_ID_CHARACTERS:
            break
        widths[widest] -= 1
    return "\n".join(
        "  ".join(_fitted(cell, room).ljust(room) for cell, room in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _fitted(cell: str, room: int) -> str:
    if len(cell) <= room:
        return cell
    begin = (room - 1) // 2
    return f"{cell[:begin]}…{cell[len(cell) - (room - 1 - begin) :]}"


def duration(seconds: float) -> str:
    """A length of time in one unit: 7.5 s, 12 min, 3 h, 4 d."""
    for limit, unit, size in ((10, "s", 1), (120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds:.1f} s" if limit == 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def bytes_text(count: float) -> str:
    """Decimal bytes with one figure after the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def refusal_lines(refusals: list[dict[str, Any]]) -> str:
    """Weights that are not shared, with a reason each; empty without any."""
    sides = {"offer": "not offered", "receive": "not taken"}
    lines = [
        f"\n  {each['model_name']} {each['source_id']}: {sides.get(each['side'], each['side'])}, {each['reason']}, "
        f"{each['count']} times; last by {each['worker_id']}: {each['text']}"
        for each in refusals
    ]
    return "".join(["\n\nWeights that are not shared, newest first:", *lines]) if lines else ""
