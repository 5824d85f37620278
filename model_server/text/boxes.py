"""Boxes as text, in the dialects that published remote-sensing models speak.

| dialect | text | unit |
| --- | --- | --- |
| `percent` | `[x1, y1, x2, y2]` | hundredths of the image (RSUniVLM, TEOChat) |
| `permille` | `[[x1,y1,x2,y2]]` | thousandths of the image (MF-RSVLM) |
| `unit` | `[x1, y1, x2, y2]` | shares of the image, 0 to 1 (LLaVA) |
| `geochat` | `<p>label</p>{<x1><y1><x2><y2>|<angle>}<delim>{...}` | hundredths; the angle in degrees (GeoChat) |
| `falcon` | `label<box><x1><y1><x2><y2></box>`, also `<quad>`, `<poly>` | 1000 bins, read at their middle (Falcon) |
| `qwen` | `[{"bbox_2d": [x1, y1, x2, y2], "label": "ship"}]` | pixels of the image as the model saw it (Qwen2.5-VL) |

Boxes come out in pixels of the image the caller names. The parsers read any text in linear time and raise
nothing but `MalformedText`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from model_server.text.malformed import MalformedText

_HUNDREDTHS = 100
_THOUSANDTHS = 1000
_BINS = 1000
_UNIT_DECIMALS = 3
_MAX_BODY = 400  # characters of one bracket that are looked at


class BoxDialect(StrEnum):
    PERCENT = "percent"
    PERMILLE = "permille"
    UNIT = "unit"
    GEOCHAT = "geochat"
    FALCON = "falcon"
    QWEN = "qwen"


@dataclass(frozen=True)
class Box:
    """Corners in pixels, x right, y down.

    `angle` is in degrees where the dialect gives one (GeoChat); `ring` holds the corners of a `<quad>` or `<poly>`
    (Falcon), whose extent the box is.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    angle: float | None = None
    ring: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class ParsedBoxes:
    """What was read, and what had to be repaired or left out on the way."""

    boxes: tuple[Box, ...]
    warnings: tuple[str, ...] = ()


def parse_boxes(text: str, dialect: BoxDialect, size: tuple[int, int], seen_size: tuple[int, int] | None = None,
                strict: bool = False) -> ParsedBoxes:  # fmt: skip
    """Read boxes out of generated text.

    Args:
        text: what the model wrote; words around the boxes are allowed, except in strict `qwen`.
        dialect: how boxes are written.
        size: (width, height) of the image, in whose pixels boxes come out.
        seen_size: (width, height) of the image as the model saw it, the unit of `qwen`; `size` where not given.
        strict: read as the published code reads (`percent`: RSUniVLM, `qwen`: FUSAR-GPT), without repairs: corners
            are neither clipped nor put in order. The other dialects then refuse whatever would need a repair.

    Returns:
        The boxes in order, and warnings; no boxes where the text speaks of none.

    Raises:
        MalformedText: there is something like a box, but none that can be read.
    """
    if strict and dialect is BoxDialect.PERCENT:
        return ParsedBoxes(tuple(_published_percent(text, size)))
    if strict and dialect is BoxDialect.QWEN:
        return ParsedBoxes(tuple(_strict_qwen(text, size, seen_size or size)))
    notes: list[str] = []
    if dialect in _BRACKETED:
        found = _bracketed(text, size, _BRACKETED[dialect], notes)
    elif dialect is BoxDialect.GEOCHAT:
        found = _geochat(text, size, notes)
    elif dialect is BoxDialect.FALCON:
        found = _falcon(text, size, notes)
    else:
        found = _qwen(text, size, seen_size or size, notes)
    boxes = tuple(_inside(box, size, notes) for box in found)
    if notes and (strict or not boxes):
        raise MalformedText(f"No box of the {dialect} dialect can be read: {notes[0]}", text)
    return ParsedBoxes(boxes, tuple(dict.fromkeys(notes)))


def write_boxes(boxes: Sequence[Box], dialect: BoxDialect, size: tuple[int, int],
                seen_size: tuple[int, int] | None = None) -> str:  # fmt: skip
    """The boxes as text: what `parse_boxes` reads back, to the dialect's resolution.

    Coordinates outside the image are clipped. Labels are left out where the dialect has none (`percent`, `permille`,
    `unit`).

    Raises:
        ValueError: a coordinate is not finite, or a label holds the dialect's own brackets.
    """
    for box in boxes:
        if not all(map(math.isfinite, (box.x1, box.y1, box.x2, box.y2, box.angle or 0.0))):
            raise ValueError(f"a box needs finite corners; got {box}")
    if dialect is BoxDialect.QWEN:
        sx, sy = _ratio(seen_size or size, size)
        rows = [{"bbox_2d": [round(b.x1 * sx), round(b.y1 * sy), round(b.x2 * sx), round(b.y2 * sy)],
                 "label": b.label} for b in boxes]  # fmt: skip
        return json.dumps(rows, ensure_ascii=False)
    if dialect is BoxDialect.PERCENT:
        return " ".join(str(_units(box, size, _HUNDREDTHS)) for box in boxes)
    if dialect is BoxDialect.PERMILLE:
        return "[" + ",".join(str(_units(box, size, _THOUSANDTHS)).replace(" ", "") for box in boxes) + "]"
    if dialect is BoxDialect.UNIT:
        return " ".join(str([n / 10**_UNIT_DECIMALS for n in _units(box, size, 10**_UNIT_DECIMALS)]) for box in boxes)
    for box in boxes:
        if set(box.label) & set("<>{}|"):
            raise ValueError(f"a label must not hold any of <>{{}}|; got {box.label!r}")
    if dialect is BoxDialect.GEOCHAT:
        return _write_geochat(boxes, size)
    return "".join(b.label + _write_falcon(b, size) for b in boxes)


# --- corners ---------------------------------------------------------------------------------------------------------


def _ratio(to: tuple[int, int], of: tuple[int, int]) -> tuple[float, float]:
    return to[0] / of[0], to[1] / of[1]


def _units(box: Box, size: tuple[int, int], units: int) -> list[int]:
    corners = zip((box.x1, box.y1, box.x2, box.y2), size * 2, strict=True)
    return [min(max(round(units * value / side), 0), units) for value, side in corners]


def _from_units(values: Sequence[float], size: tuple[int, int], units: int = _HUNDREDTHS) -> Box:
    x1, y1, x2, y2 = (value / units * side for value, side in zip(values, size * 2, strict=True))
    return Box(x1, y1, x2, y2)


def _inside(box: Box, size: tuple[int, int], notes: list[str]) -> Box:
    """The box with corners in order and inside the image."""
    width, height = size
    x1, x2 = sorted((box.x1, box.x2))
    y1, y2 = sorted((box.y1, box.y2))
    if (x1, y1) != (box.x1, box.y1):
        notes.append("corners were put in order.")
    left, right = (min(max(x, 0.0), float(width)) for x in (x1, x2))
    top, bottom = (min(max(y, 0.0), float(height)) for y in (y1, y2))
    if (left, top, right, bottom) != (x1, y1, x2, y2):
        notes.append("boxes that left the image were clipped.")
    return replace(box, x1=left, y1=top, x2=right, y2=bottom)


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- percent, permille, unit -----------------------------------------------------------------------------------------

_BRACKETED = {BoxDialect.PERCENT: _HUNDREDTHS, BoxDialect.PERMILLE: _THOUSANDTHS, BoxDialect.UNIT: 1}

_PUBLISHED_BRACKET = re.compile(r"\[([0-9., ]+)\]")
_BRACKET = re.compile(r"[\[(]([^\[\]()]*)([\])]|\Z)")
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?|-?\.\d+")


def _published_percent(text: str, size: tuple[int, int]) -> Iterator[Box]:
    """RSUniVLM's reading: brackets of fewer than four numbers do not count, numbers beyond four are dropped, and one
    bracket with a word that is no number voids the whole text."""
    for body in _PUBLISHED_BRACKET.findall(text):
        values = [value for part in body.split(",") if (value := _number(part)) is not None]
        if len(values) <= body.count(","):
            raise MalformedText(f"The bracket [{body[:40]}] holds something that is no number.", text)
        if len(values) >= 4:
            yield _from_units(values[:4], size)


def _bracketed(text: str, size: tuple[int, int], units: int, notes: list[str]) -> Iterator[Box]:
    for match in _BRACKET.finditer(text):
        opening, body, closing = match[0][0], match[1][:_MAX_BODY], match[2]
        parts = re.split(r"[,;\s]+", body.strip(" ,;\n"))
        values = [value for part in parts if (value := _number(part)) is not None]
        if len(values) < max(4, len(parts)):  # a number that cannot be read is not guessed
            if opening == "[" and (values or (body.strip() and not body.strip(" ,."))):
                notes.append("a bracket that held no four numbers was left out.")
            continue
        if len(values) > 4:
            notes.append("numbers beyond the fourth in a bracket were left out.")
        if not re.fullmatch(r"[0-9., ]+", body) or opening + closing != "[]" or body.count(",") < 3:
            notes.append("a box was not written as [x1, y1, x2, y2].")
        yield _from_units(values[:4], size, units)


# --- GeoChat ---------------------------------------------------------------------------------------------------------

_GEOCHAT_PART = re.compile(r"<p>|</p>|\{[^{}]*\}|\{[^{}]*\Z")
_ANGLED = re.compile(r"<\s*(-?\d+(?:\.\d*)?)\s*>")


def _geochat(text: str, size: tuple[int, int], notes: list[str]) -> Iterator[Box]:
    label, opened = "", -1
    for match in _GEOCHAT_PART.finditer(text):
        part = match[0]
        if part == "<p>":
            opened = match.end()
        elif part == "</p>":
            label, opened = (text[opened : match.start()].strip() if opened >= 0 else ""), -1
        else:
            corners, bar, turn = part[:_MAX_BODY].strip("{}").partition("|")
            values = [v for v in map(_number, _ANGLED.findall(corners)) if v is not None]
            turns = [v for v in map(_number, _ANGLED.findall(turn)) if v is not None]
            if len(values) < 4:
                notes.append("a group in braces held fewer than four numbers and was left out.")
                continue
            if len(values) > 4 or not part.endswith("}") or (bar and not turns):
                notes.append("a box was not written as {<x1><y1><x2><y2>|<angle>}.")
            yield replace(_from_units(values[:4], size), label=label, angle=turns[0] if turns else None)


def _write_geochat(boxes: Sequence[Box], size: tuple[int, int]) -> str:
    parts: list[str] = []
    label = None
    for box in boxes:
        corners = "".join(f"<{value}>" for value in _units(box, size, _HUNDREDTHS))
        turn = "" if box.angle is None else f"|<{round(box.angle)}>"
        lead = "<delim>" if box.label == label else (f"<p>{box.label}</p>")
        parts.append(f"{lead}{{{corners}{turn}}}")
        label = box.label
    return "".join(parts)


# --- Falcon ----------------------------------------------------------------------------------------------------------

_FALCON_PART = re.compile(r"<(box|quad|poly)>((?:<\s*-?\d{1,9}\s*>)*)(</\1>)?")


def _falcon(text: str, size: tuple[int, int], notes: list[str]) -> Iterator[Box]:
    end = 0
    label = ""
    for match in _FALCON_PART.finditer(text):
        before = text[end : match.start()].strip()
        end = match.end()
        label = re.sub(r"</?\w{1,8}>", "", before[-_MAX_BODY:]).strip(" ,.;:\n") or label
        values = [int(value) for value in re.findall(r"-?\d+", match[2])]
        kind = match[1]
        least = {"box": 4, "quad": 8, "poly": 6}[kind]
        if len(values) < least:
            notes.append(f"a <{kind}> held fewer than {least} numbers and was left out.")
            continue
        if not match[3] or (kind != "poly" and len(values) > least) or len(values) % 2:
            notes.append(f"a <{kind}> was not closed after its numbers.")
        values = values[: len(values) - len(values) % 2] if kind == "poly" else values[:least]
        points = [(_bin(x, size[0]), _bin(y, size[1])) for x, y in zip(values[::2], values[1::2], strict=True)]
        xs, ys = zip(*points, strict=True)
        if kind == "box":
            yield Box(xs[0], ys[0], xs[1], ys[1], label)
        else:
            yield Box(min(xs), min(ys), max(xs), max(ys), label, ring=tuple(points))


def _bin(value: int, side: int) -> float:
    """The middle of a bin; the last edge, 1000, which published prompts hold, is the image's own."""
    return float(side) if value == _BINS else (value + 0.5) / _BINS * side


def _write_falcon(box: Box, size: tuple[int, int]) -> str:
    points = box.ring or ((box.x1, box.y1), (box.x2, box.y2))
    kind = "box" if not box.ring else "quad" if len(box.ring) == 4 else "poly"
    bins = (math.floor(_BINS * value / side) for point in points for value, side in zip(point, size, strict=True))
    return f"<{kind}>" + "".join(f"<{min(max(value, 0), _BINS - 1)}>" for value in bins) + f"</{kind}>"


# --- Qwen ------------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"```\w{0,10}")
_OBJECT = re.compile(r"\{[^{}]*\}")
_LOOSE_BOX = re.compile(r"bbox_2d[\"'\s:=\[(]{1,6}([^\[\]]{0,200})")
_NOTHING = ("none", "null", "[]")


def _strict_qwen(text: str, size: tuple[int, int], seen: tuple[int, int]) -> Iterator[Box]:
    """FUSAR-GPT's reading: a JSON list (or none), perhaps fenced, every object sound."""
    body = text.strip()
    if body.lower() in ("none", "null"):
        return
    lines = body.splitlines()
    if body.startswith("```") and len(lines) >= 3 and lines[-1].strip() == "```":
        body = "\n".join(lines[1:-1])
    rows = _json(body)
    if not isinstance(rows, list):
        raise MalformedText('A list [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}] or None is needed.', text)
    boxes = [_qwen_box(row, size, seen) for row in rows]
    for box in boxes:
        if box is None or box.x1 >= box.x2 or box.y1 >= box.y2:
            raise MalformedText("Each object needs a label and a bbox_2d of four numbers, x1 < x2 and y1 < y2.", text)
        yield box


def _qwen(text: str, size: tuple[int, int], seen: tuple[int, int], notes: list[str]) -> Iterator[Box]:
    body = _FENCE.sub("", text).strip()
    if body.lower().rstrip(".") in _NOTHING:
        return
    rows = _json(body)
    if isinstance(rows, dict):
        notes.append("a single object stood where a list was expected.")
        rows = [rows]
    if not isinstance(rows, list):
        notes.append("the text is no JSON list; its readable objects were taken.")
        rows = [row if isinstance(row := _json(part), dict) else _loose_object(part) for part in _OBJECT.findall(body)]
    for row in rows:
        sound = _qwen_box(row, size, seen)
        box = sound or _qwen_box(_mended(row), size, seen)
        if box is None:
            notes.append("an object without a bbox_2d of four finite numbers was left out.")
            continue
        if sound is None:
            notes.append("an object had no label or numbers written as text.")
        yield box


def _qwen_box(row: object, size: tuple[int, int], seen: tuple[int, int]) -> Box | None:
    """A box in the image's pixels, or None where the object is not sound."""
    if not isinstance(row, dict) or not isinstance(row.get("label"), str):
        return None
    values = row.get("bbox_2d")
    if not isinstance(values, list) or len(values) != 4 or not all(type(v) in (int, float) for v in values):
        return None
    corners = [_number(str(v)) if isinstance(v, float) or abs(v) < 1e15 else None for v in values]
    if any(corner is None for corner in corners):
        return None
    sx, sy = _ratio(size, seen)
    x1, y1, x2, y2 = (corner for corner in corners if corner is not None)
    return Box(x1 * sx, y1 * sy, x2 * sx, y2 * sy, row["label"])


def _mended(row: object) -> object:
    """An object with an empty label where it had none, and numbers read out of text."""
    if not isinstance(row, dict) or not isinstance(row.get("bbox_2d"), list):
        return None
    label = row.get("label")
    values = [_number(v[:40]) if isinstance(v, str) else v for v in row["bbox_2d"][:5]]
    return {"label": label if isinstance(label, str) else "", "bbox_2d": values}


def _loose_object(part: str) -> object:
    """An object read by its key words alone, for JSON that is almost right."""
    found = _LOOSE_BOX.search(part)
    label = re.search(r"label\W{1,6}([^\"'{},]{1,80})", part)
    values = [_number(value) for value in _NUMBER.findall(found[1])][:4] if found else []
    return {"bbox_2d": values, "label": label[1].strip() if label else None}


def _json(text: str) -> object:
    """The value of a JSON text; a string where it is none (nesting too deep to read counts as none)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ""
