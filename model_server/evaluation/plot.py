"""A line plot as PNG, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (900, 520)
MARGIN = (70, 50, 260, 60)  # left, top, right (the legend's), bottom
SMOOTH = 3  # drawn this much larger, then reduced
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#333333")
GRID, INK = "#dddddd", "#222222"


def line_plot(path: Path, title: str, x_name: str, x_labels: Sequence[str], y_name: str,
              curves: Mapping[str, Sequence[float]]) -> None:  # fmt: skip
    """Draw curves over evenly spaced places on x; y reaches from 0 to the largest value, at least to 1."""
    width, height = (SMOOTH * n for n in SIZE)
    left, top, right, bottom = (SMOOTH * n for n in MARGIN)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font, large = (ImageFont.load_default(SMOOTH * size) for size in (14, 18))
    most = max(1.0, *(value for curve in curves.values() for value in curve))

    def place(i: int, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * i / max(len(x_labels) - 1, 1)
        return x, height - bottom - (height - top - bottom) * value / most

    for step in range(int(5 * most) + 1):
        (x1, y), (x2, _) = place(0, step / 5), place(len(x_labels) - 1, step / 5)
        draw.line((x1, y, x2, y), GRID, SMOOTH)
        draw.text((x1 - 8 * SMOOTH, y), f"{step / 5:.1f}", INK, font, anchor="rm")
    for i, label in enumerate(x_labels):
        x, y = place(i, 0)
        draw.text((x, y + 8 * SMOOTH), label, INK, font, anchor="mt")
    middle = (left + width - right) / 2
    draw.text((middle, height - 8 * SMOOTH), x_name, INK, font, anchor="mb")
    draw.text((left, top / 3), title, INK, large, anchor="lm")
    draw.text((left, top * 0.8), y_name, INK, font, anchor="lm")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(i, value) for i, value in enumerate(curve)]
        draw.line(points, colour, 3 * SMOOTH, joint="curve")
        for x, y in points:
            draw.ellipse((x - 4 * SMOOTH, y - 4 * SMOOTH, x + 4 * SMOOTH, y + 4 * SMOOTH), colour)
        y = top + (20 + 24 * number) * SMOOTH
        x = width - right + 20 * SMOOTH
        draw.line((x, y, x + 24 * SMOOTH, y), colour, 3 * SMOOTH)
        draw.text((x + 32 * SMOOTH, y), name, INK, font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path)
