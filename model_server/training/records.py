"""Reader of labelled remote-sensing data: a directory of sets, each with a `records.jsonl`, one JSON object a line.

Shared by training and evaluation. It needs Pillow and numpy only; nothing is decoded until `load_image` is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from model_server.text.questions import QA


class DataError(ValueError):
    """The data are not as the record format has them; the message names the set, file or line."""


@dataclass(frozen=True)
class LabelledBox:
    """One object: `bbox` is [x1, y1, x2, y2] in pixels of the image."""

    label: str
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """One image, or a change pair, with whatever is annotated on it; empty where a set lacks an annotation.

    Paths are absolute. `width` and `height` are pixels of every image and mask. `presence` maps a label to whether
    it is in the image. `mask_classes` maps a pixel value of `mask` to its name.
    """

    id: str
    set: str
    split: str
    images: tuple[Path, ...]
    width: int
    height: int
    modality: str = "optical"
    gsd_m: float | None = None
    sensor: str | None = None
    crs: bool = False
    scene: str | None = None
    captions: tuple[str, ...] = ()
    presence: Mapping[str, bool] = field(default_factory=dict)
    qa: tuple[QA, ...] = ()
    objects: tuple[LabelledBox, ...] = ()
    mask: Path | None = None
    mask_classes: Mapping[int, str] = field(default_factory=dict)
    change_mask: Path | None = None
    length_m: float | None = None  # of the one ship in the middle of a chip


def read_records(data_dir: Path | str, sets: Sequence[str], split: str | None) -> list[Record]:
    """All records of one split of the named sets (None: of every split), in the order of the sets and of their files.

    The list is empty where the sets hold nothing of that split. Raises DataError for a missing set (naming those
    that are there) and for a line that does not follow the record format (naming file and line).
    """
    root = Path(data_dir)
    records = []
    for name in sets:
        path = root / name / "records.jsonl"
        if not path.is_file():
            raise DataError(f"no set {name!r} in {root}; the sets there are: {', '.join(set_names(root)) or 'none'}")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = _parse(line, name, path, number)
                if split is None or record.split == split:
                    records.append(record)
    return records


def set_names(data_dir: Path | str) -> list[str]:
    """The sets that a data directory holds, sorted."""
    return sorted(path.parent.name for path in Path(data_dir).glob("*/records.jsonl"))


def load_image(path: Path | str) -> np.ndarray:
    """Decode an image to uint8 [H, W, 3] RGB.

    One channel is repeated three times and alpha is dropped. Raises DataError for a missing file, one that Pillow
    cannot decode, or samples that are not 8 bit.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: its samples are {image.mode!r}, only 8-bit images can be trained on")
            band = image.getchannel(0) if image.mode in ("L", "LA") else None
            rgb = Image.merge("RGB", (band, band, band)) if band is not None else image.convert("RGB")
            return np.asarray(rgb, dtype=np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image") from error
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: not an image that can be decoded ({error})") from error


def _parse(line: str, set_name: str, path: Path, number: int) -> Record:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record is a JSON object, this is {type(row).__name__}")
    try:
        return _record(row, set_name, path.parent)
    except KeyError as error:
        raise DataError(f"{where}: the key {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: a value is of the wrong form ({error})") from error


def _record(row: dict[str, Any], set_name: str, folder: Path) -> Record:
    images = tuple(folder / image for image in row["images"])
    if isinstance(row["images"], str) or len(images) not in (1, 2):
        raise ValueError(f"`images` is a list of one path or two, not {row['images']!r}")
    return Record(
        id=str(row["id"]),
        set=set_name,
        split=str(row["split"]),
        images=images,
        width=int(row["width"]),
        height=int(row["height"]),
        modality=row.get("modality", "optical"),
        gsd_m=row.get("gsd_m"),
        sensor=row.get("sensor"),
        crs=bool(row.get("crs", False)),
        scene=row.get("scene"),
        captions=tuple(row.get("captions") or ()),
        presence={label: bool(there) for label, there in (row.get("presence") or {}).items()},
        qa=tuple(QA(qa["question"], str(qa["answer"]), qa["type"]) for qa in row.get("qa") or ()),
        objects=tuple(_box(item) for item in row.get("objects") or ()),
        mask=folder / row["mask"] if row.get("mask") else None,
        mask_classes={int(value): name for value, name in (row.get("mask_classes") or {}).items()},
        change_mask=folder / row["change_mask"] if row.get("change_mask") else None,
        length_m=row.get("length_m"),
    )


def _box(item: dict[str, Any]) -> LabelledBox:
    x1, y1, x2, y2 = (float(value) for value in item["bbox"])
    return LabelledBox(item["label"], (x1, y1, x2, y2))
