"""Small pictures of an answer over its image: boxes, tinted masks, a legend and a scale bar.

Made to be looked at by a person or shown to a model: at most `MAX_BYTES` as a palette PNG. Colours are those of Okabe
and Ito (2008), which people with any common colour blindness tell apart; outlines have a dark rim, so that they show on
bright and on dark ground. Legend and scale bar stand below the picture and hide nothing of it.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rs_tools.geometry.measures import TileFrame

MAX_BYTES = 100_000
MAX_SIDE = 768

# Okabe and Ito, without black; bright ones first, which show best on imagery.
_COLORS = (
    (240, 228, 66),
    (86, 180, 233),
    (213, 94, 0),
    (204, 121, 167),
    (0, 158, 115),
    (230, 159, 0),
    (0, 114, 178),
)
_STEPS = ((768, 128), (768, 64), (640, 64), (640, 40), (512, 40), (448, 32), (384, 32), (320, 24), (256, 16), (192, 16))
_FONT_SIZE = 12
_INK, _PAPER, _SOFT = (245, 245, 245), (24, 26, 30), (150, 155, 160)
_TINT = 0.4
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAD = 6


def class_color(value: int) -> tuple[int, int, int]:
    """RGB of the class with this mask value (from 1), the same in previews and colour tables; repeats after seven."""
    return _COLORS[(value - 1) % len(_COLORS)]


@dataclass(frozen=True)
class Marked:
    """One object to outline. `box`: x1, y1, x2, y2 in scene pixels."""

    label: str
    score: float
    box: Sequence[float]


def render(
    rgb: np.ndarray,
    region: tuple[int, int, int, int],
    objects: Sequence[Marked] = (),
    mask: np.ndarray | None = None,
    classes: Mapping[int, str] | None = None,
    across_m: float | None = None,
) -> bytes:
    """A PNG of at most `MAX_BYTES`.

    Args:
        rgb: uint8 [H, W, 3], the region at any scale.
        region: [x1, y1, x2, y2] in scene pixels.
        objects: outlined, and labelled as far as labels find room.
        mask: uint8 [h, w] over the same region at any scale; 0 and 255 stay clear.
        classes: mask value -> name, for the legend.
        across_m: metres that a scene pixel is wide; None draws no scale bar.
    """
    picture = Image.fromarray(rgb)
    png = b""
    for side, colors in _STEPS:
        scale = side / max(picture.size)
        if scale > 1 and side > 256:  # never enlarged beyond what shows labels well
            scale = max(1.0, 256 / max(picture.size))
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        sheet = _sheet(picture, size, region, objects, mask, classes or {}, across_m)
        png = _encoded(sheet, colors)
        if len(png) <= MAX_BYTES:
            break
    return png


def _sheet(
    picture: Image.Image,
    size: tuple[int, int],
    region: tuple[int, int, int, int],
    objects: Sequence[Marked],
    mask: np.ndarray | None,
    classes: Mapping[int, str],
    across_m: float | None,
) -> Image.Image:
    image = picture.resize(size, Image.Resampling.LANCZOS if size[0] < picture.width else Image.Resampling.BICUBIC)
    entries = []
    if mask is not None:
        small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        image = _tinted(image, small)
        shares = np.bincount(mask.ravel(), minlength=256) / max(1, int((mask != 255).sum()))
        entries += [(class_color(value), f"{name} {shares[value]:.1%}") for value, name in classes.items()]
    counts = Counter(one.label for one in objects)
    values = {name: value for value, name in classes.items()}  # an object of a class has its colour, others a new one
    for label, _ in counts.most_common():
        values.setdefault(label, max(values.values(), default=0) + 1)
    colors = {label: class_color(values[label]) for label in counts}
    entries += [(colors[label], f"{label} ({count})") for label, count in counts.most_common()]
    frame = TileFrame(region, size)
    _draw_objects(image, frame, objects, colors)
    return _with_footer(image, entries, None if across_m is None else across_m * float(frame.scale[0]))


def _tinted(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Classes as a veil of their colour with a solid outline."""
    pixels = np.asarray(image).astype(np.float32)
    inside = (mask != 0) & (mask != 255)
    table = np.array([class_color(max(1, value)) for value in range(256)], np.float32)
    tint = table[mask]
    outline = np.zeros_like(inside)
    differs = mask[:, 1:] != mask[:, :-1]
    outline[:, 1:] |= differs
    outline[:, :-1] |= differs
    differs = mask[1:] != mask[:-1]
    outline[1:] |= differs
    outline[:-1] |= differs
    share = np.where(outline, 1.0, _TINT) * inside
    return Image.fromarray((pixels + share[..., None] * (tint - pixels)).astype(np.uint8))


def _draw_objects(
    image: Image.Image, frame: TileFrame, objects: Sequence[Marked], colors: Mapping[str, tuple[int, int, int]]
) -> None:
    draw = ImageDraw.Draw(image)
    ranked = sorted(objects, key=lambda one: -one.score)
    boxes = [frame.to_tile(np.array(one.box).reshape(2, 2)).reshape(4).tolist() for one in ranked]
    for one, box in reversed(list(zip(ranked, boxes, strict=True))):  # the surest on top
        x1, y1, x2, y2 = (round(side) for side in box)
        x2, y2 = max(x2, x1 + 2), max(y2, y1 + 2)
        thick = 2 if min(x2 - x1, y2 - y1) > 12 else 1
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=thick + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colors[one.label], width=thick)
    font = ImageFont.load_default(_FONT_SIZE)
    taken: list[tuple[float, float, float, float]] = []
    for one, box in zip(ranked, boxes, strict=True):
        text = f"{one.label} {one.score:.2f}" if len(colors) > 1 else f"{one.score:.2f}"
        place = _label_place(draw.textbbox((0, 0), text, font=font), box, image.size, taken, boxes)
        if place is None:
            continue
        taken.append(place)
        draw.rectangle(place, fill=_PAPER)
        draw.rectangle((place[0], place[1], place[0] + 2, place[3]), fill=colors[one.label])
        draw.text((place[0] + 5, (place[1] + place[3]) / 2), text, fill=_INK, font=font, anchor="lm")


def _label_place(
    text: tuple[float, float, float, float],
    box: Sequence[float],
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
    boxes: Sequence[Sequence[float]],
) -> tuple[float, float, float, float] | None:
    """Where a label goes: beside its box, in the picture, over no other label and over as few boxes as can be."""
    width, height = text[2] - text[0] + 8, _FONT_SIZE + 3
    x1, y1, x2, y2 = box
    corners = [
        (x1 - 1, y1 - height - 2),
        (x1 - 1, y2 + 2),
        (x2 - width + 1, y1 - height - 2),
        (x2 - width + 1, y2 + 2),
        (x2 + 3, y1),
        (x1 - width - 3, y1),
    ]
    if x2 - x1 > width + 4 and y2 - y1 > 2 * height:
        corners.append((x1 + 2, y1 + 2))
    best = None
    for x, y in corners:
        place = (round(x), round(y), round(x + width), round(y + height))
        inside = place[0] >= 0 and place[1] >= 0 and place[2] < size[0] and place[3] < size[1]
        if not inside or any(_overlap(place, other) for other in taken):
            continue
        hidden = sum(_overlap(place, other) for other in boxes)
        if best is None or hidden < best[0]:
            best = hidden, place
    # In a crowd a label that hides several boxes tells less than it takes; the legend still counts them.
    return best[1] if best is not None and best[0] <= 1 else None


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with_footer(
    image: Image.Image, entries: Sequence[tuple[tuple[int, int, int], str]], metres_per_pixel: float | None
) -> Image.Image:
    """The picture over a dark strip with the legend at the left and the scale bar at the right."""
    font = ImageFont.load_default(_FONT_SIZE)
    measure = ImageDraw.Draw(image)
    bar = _scale_bar(image.width, metres_per_pixel)
    bar_room = 0 if bar is None else max(bar[0], measure.textlength(bar[1], font=font)) + 2 * _PAD
    line = _FONT_SIZE + _PAD
    placed, x, y = [], float(_PAD), float(_PAD)
    for color, text in entries:
        text = _fitting(text, image.width - 2 * _PAD - 16, font, measure)
        width = 16 + measure.textlength(text, font=font)
        if x > _PAD and x + width > image.width - _PAD - (bar_room if y <= line else 0):
            x, y = float(_PAD), y + line
        placed.append((x, y, color, text))
        x += width + 2 * _PAD
    if placed and bar is not None and _PAD + 16 + measure.textlength(placed[0][3], font=font) + bar_room > image.width:
        placed = [(x, y + 2 * line, color, text) for x, y, color, text in placed]  # too narrow for both in a line
    rows = max([y + line for _, y, _, _ in placed] + ([2 * line + 2] if bar else []), default=0)
    if rows == 0:
        return image
    sheet = Image.new("RGB", (image.width, round(image.height + rows + _PAD // 2)), _PAPER)
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for x, y, color, text in placed:
        top = image.height + y
        draw.rectangle((x, top + 1, x + 10, top + 11), fill=color)
        draw.text((x + 16, top + 6), text, fill=_INK, font=font, anchor="lm")
    if bar is not None:
        length, text = bar
        right, low = image.width - _PAD, image.height + 2 * line - 4
        draw.line((right - length, low - 4, right - length, low, right, low, right, low - 4), fill=_INK, width=2)
        draw.text((right, low - 8), text, fill=_INK, font=font, anchor="rb")
    return sheet


def _fitting(text: str, room: float, font: _Font, draw: ImageDraw.ImageDraw) -> str:
    if draw.textlength(text, font=font) <= room:
        return text
    while len(text) > 1 and draw.textlength(f"{text}\u2026", font=font) > room:
        text = text[:-1]
    return f"{text}\u2026"


def _scale_bar(width: int, metres_per_pixel: float | None) -> tuple[int, str] | None:
    """Length in pixels and text of a bar of a round number of metres, at most a quarter of the width."""
    if not metres_per_pixel or width < 64:
        return None
    most = width / 4 * metres_per_pixel
    power = 10.0 ** np.floor(np.log10(most))
    metres = max(step * power for step in (1, 2, 5) if step * power <= most)
    text = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m" if metres >= 1 else f"{metres * 100:g} cm"
    return round(metres / metres_per_pixel), text


def _encoded(sheet: Image.Image, colors: int) -> bytes:
    """A palette PNG: `colors` fitted to the picture, and the drawing's own colours exactly."""
    fitted = sheet.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).getpalette() or []
    greys = [round(low + (high - low) * step / 4) for step in range(5) for low, high in zip(_PAPER, _INK, strict=True)]
    own = [channel for color in _COLORS for channel in color] + greys + [0, 0, 0]
    palette = Image.new("P", (1, 1))
    palette.putpalette((fitted[: 3 * colors] + own)[: 3 * 256])
    file = io.BytesIO()
    sheet.quantize(palette=palette, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()
