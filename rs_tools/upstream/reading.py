"""An endpoint's words as the answers of our protocol, in the dialects that `model_server.text` reads.

A general endpoint gives no calibrated confidence: `UNKNOWN` stands in its place and a warning says so. Our own server's
completions carry one under `perception`; there it is taken over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model_server.protocol import (
    PerceiveRequest,
    RankedAnswer,
    TileAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
)
from model_server.text.answers import answer_kind, normalise
from model_server.text.boxes import Box, BoxDialect, ParsedBoxes, parse_boxes
from model_server.text.malformed import MalformedText
from model_server.text.masks import BACKGROUND, LabelGrid, parse_mask
from rs_tools.upstream.profiles import Profile

UNKNOWN = 0.5
UNCALIBRATED = (
    f"This endpoint gives no calibrated confidence: confidences and scores of {UNKNOWN:g} are placeholders, nothing is "
    "withheld for being unsure, and min_score has no meaning."
)
_NOTHING = re.compile(r"\b(no|not|none|null|nothing)\b")
_ALONE = re.compile(r"(yes|no)\b[,.!\s]?", re.I)


@dataclass(frozen=True)
class Spoken:
    """One completion: its text, and the calibrated facts where the endpoint is one of our servers.

    `cut`: the text ended because of a limit on its length. `calibrated`: it is one of ours; `confidence` is None there
    too where nothing was found and for masks.
    """

    text: str
    cut: bool = False
    calibrated: bool = False
    confidence: float | None = None
    abstained: bool = False
    known: bool | None = None
    others: tuple[RankedAnswer, ...] = ()

    @property
    def sure(self) -> float:
        return UNKNOWN if self.confidence is None else self.confidence


@dataclass
class Heard:
    """What is remembered over all tiles of a call: what had to be repaired, left out or guessed."""

    warnings: dict[str, None] = field(default_factory=dict)

    def note(self, *warnings: str) -> None:
        self.warnings |= dict.fromkeys(warnings)


def read(profile: Profile, request: PerceiveRequest, size: tuple[int, int], seen: tuple[int, int],
         spoken: Sequence[Spoken], heard: Heard) -> TileAnswer:  # fmt: skip
    """The answer for one tile or pair.

    Args:
        profile: whose words these are.
        request: what was asked.
        size: (width, height) of the tile; seen: of the picture as it was sent.
        spoken: an answer to each of `profile.prompts`.
        heard: takes what a reader of the answer should know.

    Raises:
        MalformedText: the words hold no answer of the task's form.
    """
    if request.task in ("caption", "vqa", "classify", "ground") and not all(one.calibrated for one in spoken):
        heard.note(UNCALIBRATED)
    if any(one.cut for one in spoken):
        heard.note("An answer of the endpoint was cut off at its limit of tokens; what came after is missing.")
    match request.task:
        case "caption":
            return TileCaption(caption=_said(spoken[0]), confidence=spoken[0].sure)
        case "vqa":
            return _answer(spoken[0])
        case "classify":
            return _classes(request.labels, spoken[0], heard)
        case "ground":
            return _objects(profile, request.text, size, seen, spoken[0], heard)
        case "segment":
            planes = [_plane(one, label, size, heard) for one, label in zip(spoken, request.labels, strict=True)]
            n = len(planes)
            return TileMasks(
                labels=request.labels, thresholds=[UNKNOWN] * n, known=[one.known is not False for one in spoken],
                scale=1, probabilities=np.stack(planes),
            )  # fmt: skip
        case "detect_change":
            return TileChange(threshold=UNKNOWN, scale=1, probabilities=_plane(spoken[0], None, size, heard))


def _said(spoken: Spoken) -> str:
    text = " ".join(spoken.text.split())
    if not text:
        raise MalformedText("The endpoint said nothing.", spoken.text)
    return text


def _answer(spoken: Spoken) -> TileVqa:
    text = _said(spoken)
    short = text.rstrip(".").strip()
    if alone := _ALONE.match(short):
        short = alone[1].lower()
    kind = answer_kind(short.lower())
    return TileVqa(
        answer=normalise(short) if kind == "count" else short,
        kind=kind,
        confidence=spoken.sure,
        abstained=spoken.abstained,
        alternatives=list(spoken.others),
    )


def _classes(labels: Sequence[str], spoken: Spoken, heard: Heard) -> TileClasses:
    """All weight on the class that was named, or as much as the endpoint was sure, and the rest shared evenly."""
    text = normalise(_said(spoken))
    exact = [label for label in labels if normalise(label) == text]
    inside = [label for label in labels if re.search(rf"\b{re.escape(normalise(label))}\b", text)]
    named = exact or inside
    # "bare soil" names "soil" too: the longest name that holds the others is meant.
    longest = max(named, key=len, default="")
    if not named or not all(normalise(one) in normalise(longest) for one in named):
        problem = f"The endpoint did not name exactly one of the classes {', '.join(labels)}."
        raise MalformedText(problem, spoken.text)
    if spoken.confidence is None:
        heard.note("The classes' scores are 1 for the class that was named and 0 for the others, no probabilities.")
    sure = 1.0 if spoken.confidence is None else spoken.confidence
    rest = (1 - sure) / (len(labels) - 1)
    return TileClasses(labels=list(labels), scores=[sure if label == longest else rest for label in labels])


def _objects(profile: Profile, phrase: str, size: tuple[int, int], seen: tuple[int, int], spoken: Spoken,
             heard: Heard) -> TileObjects:  # fmt: skip
    if not spoken.calibrated:
        heard.note(profile.limits)
    dialect = BoxDialect.QWEN if _is_ours(spoken.text) else profile.boxes
    parsed = ParsedBoxes(()) if _means_none(spoken.text) else parse_boxes(spoken.text, dialect, size, seen)
    heard.note(*(f"Boxes as text: {warning}" for warning in parsed.warnings))
    if not parsed.boxes and not _means_none(spoken.text):
        problem = f"No box of the {profile.boxes} form and no word that there is none; "
        raise MalformedText(problem + f"was {phrase!r} looked for, and is --profile right?", spoken.text)
    boxes = [box for box in parsed.boxes if box.x2 > box.x1 and box.y2 > box.y1]
    scores = _scores(spoken.text, parsed.boxes) if spoken.confidence is not None else {}
    return TileObjects(
        boxes=[(box.x1, box.y1, box.x2, box.y2) for box in boxes],
        scores=[scores.get(id(box), UNKNOWN) for box in boxes],
        threshold=0.0,
        known=spoken.known is not False,
        scale=1,
    )


def _is_ours(text: str) -> bool:
    """Whether it is the JSON that our own server writes whatever dialect it was asked in."""
    return text.lstrip().startswith("[{") or text.strip() == "[]"


def _means_none(text: str) -> bool:
    """Whether words without any number say that there is nothing."""
    body = text.strip().strip("`").removeprefix("json").strip().lower()
    return body == "[]" or (not re.search(r"\d", body) and bool(_NOTHING.search(body)))


def _scores(text: str, boxes: Sequence[Box]) -> dict[int, float]:
    """The score beside each box; none where they cannot be told."""
    rows = json.loads(text)
    given = [row.get("score") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    scores = [float(one) for one in given if isinstance(one, float | int) and 0 <= one <= 1]
    if not len(scores) == len(given) == len(boxes):
        return {}
    return {id(box): score for box, score in zip(boxes, scores, strict=True)}


def _plane(spoken: Spoken, label: str | None, size: tuple[int, int], heard: Heard) -> np.ndarray:
    """uint8 [H, W], 255 where a cell has a label, of several the one that is meant; 0 elsewhere."""
    grid = parse_mask(_grid_text(spoken.text))
    rows, columns = grid.values.shape
    heard.note(f"The mask was drawn as text on a grid of {columns} x {rows} cells a tile: its edges are as coarse.")
    heard.note(*(f"Mask as text: {warning}" for warning in grid.warnings))
    return np.where(_on(grid, label, size), 255, 0).astype(np.uint8)


def _on(grid: LabelGrid, label: str | None, size: tuple[int, int]) -> np.ndarray:
    wanted = label.strip().lower() if label is not None else None
    if wanted in grid.names:
        return grid.mask(wanted, *size)
    return ~grid.mask(BACKGROUND, *size)


def _grid_text(text: str) -> str:
    """The run-length rows; in our own server's JSON they stand under `mask`."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MalformedText("The mask begins like JSON and is none.", text) from error
    if not isinstance(found, dict) or not isinstance(found.get("mask"), str):
        raise MalformedText("The JSON holds no text `mask`.", text)
    return found["mask"]
