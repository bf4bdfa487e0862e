"""GB/s as bars, PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 960, 22, 8, 190, 90, 44
COLOURS = {True: "#2563eb", False: "#94a3b8"}


def draw(speeds: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """`speeds`: warm and cold → candidate → GB/s; each state a group, the fastest first, ours in colour."""
    rows = sum(len(group) for group in speeds.values())
    image = Image.new("RGB", (WIDTH, TOP * len(speeds) + (BAR + GAP) * rows + GAP), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    top = 0
    for state, group in speeds.items():
        canvas.text((GAP, top + 14), f"{state} page cache, GB/s", "black", font=font)
        top += TOP
        most = max(group.values())
        for name, speed in sorted(group.items(), key=lambda item: -item[1]):
            canvas.text((GAP, top + 2), name, "black", font=font)
            end = LEFT + (WIDTH - LEFT - RIGHT) * speed / most
            canvas.rectangle((LEFT, top, end, top + BAR), COLOURS[name.startswith("ours")])
            canvas.text((end + GAP, top + 2), f"{speed:.2f}", "black", font=font)
            top += BAR + GAP
    image.save(file)
