"""A page of panels as PNG: pictures with a few lines under them, a legend and notes, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

SIDE = 240  # pixels of a picture
GAP, LINE = 12, 16
MOST_BYTES = 380_000
COLOURS = (256, 160, 96, 64, 40, 24)  # palettes that are tried, largest first
PAPER, INK, FAINT = "#ffffff", "#222222", "#666666"


@dataclass(frozen=True)
class Panel:
    """Pictures side by side, each uint8 [SIDE, SIDE, 3], and what is said under them."""

    pictures: tuple[np.ndarray, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """`legend`: (name, colour) of what is drawn on the pictures; `notes`: whose pictures these are, how chosen."""

    title: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    legend: tuple[tuple[str, str], ...] = ()


def reduced(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 [H, W, 3] squashed to [side, side, 3]."""
    how = Image.Resampling.BOX if min(image.shape[:2]) > side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((side, side), how))


def wrapped(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines of whole words of at most `width` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw(page: Page, path: Path) -> None:
    """Write the page, in as many colours as `MOST_BYTES` allow."""
    small, large = ImageFont.load_default(12), ImageFont.load_default(17)
    pictures = max(len(panel.pictures) for panel in page.panels)
    columns = max(4 // pictures, 1)
    width = pictures * SIDE + (pictures - 1) * 4  # of a panel
    said = [[line for text in panel.lines for line in wrapped(text, width, small)] for panel in page.panels]
    rows = [range(i, min(i + columns, len(said))) for i in range(0, len(said), columns)]
    heights = [SIDE + 4 + LINE * max(len(said[i]) for i in row) + GAP for row in rows]
    full = columns * width + (columns + 1) * GAP
    notes = [line for text in page.notes for line in wrapped(text, full - 2 * GAP, small)]
    top = 36 + (LINE + 8 if page.legend else 0)
    image = Image.new("RGB", (full, top + sum(heights) + LINE * len(notes) + GAP), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((GAP, 8), page.title, INK, large)
    x = GAP
    for name, colour in page.legend:
        pen.rectangle((x, 39, x + 12, 51), colour, INK)
        pen.text((x + 18, 38), name, INK, small)
        x += 18 + round(small.getlength(name)) + 2 * GAP
    y = top
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = GAP + column * (width + GAP)
            for k, picture in enumerate(page.panels[i].pictures):
                image.paste(Image.fromarray(picture), (x + k * (SIDE + 4), y))
            for k, line in enumerate(said[i]):
                pen.text((x, y + SIDE + 4 + k * LINE), line, INK, small)
        y += height
    for k, line in enumerate(notes):
        pen.text((GAP, y + k * LINE), line, FAINT, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(image, [PAPER, INK, FAINT, *(colour for _, colour in page.legend)]))


def _encoded(image: Image.Image, kept: Sequence[str]) -> bytes:
    """The picture with the largest palette that is small enough; the colours `kept` stay as they are."""
    data = b""
    for colours in COLOURS:
        fitted = image.quantize(colours - len(kept), Image.Quantize.MEDIANCUT).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([*(value for colour in kept for value in ImageColor.getrgb(colour)), *fitted])
        buffer = BytesIO()
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
        if len(data) <= MOST_BYTES:
            break
    return data
