"""Answers to "how many" and "how much ground" from what `ground` and `segment` found, with that as the evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rs_tools.grounding import Found
from rs_tools.painting import Painted
from rs_tools.reduction import MAX_EVIDENCE
from rs_tools.results import Evidence, GroundResult, Result, SegmentResult, VqaResult

_UNSURE = 0.5  # confidence below which an amount is a guess


def counted(phrase: str, region: Sequence[int], boxes: GroundResult, found: Found) -> VqaResult:
    """The number of boxes. Confidence: the mean of their scores; of none, that the best candidate is wrong."""
    scores = found.scores.tolist()
    confidence = sum(scores) / len(scores) if scores else 1 - found.best_below
    uri = boxes.artifacts[0].uri
    said = f"{boxes.count} boxes of {phrase!r}"
    whole = Evidence(region=list(region), answer=said, confidence=confidence, artifact=uri)
    each = [
        Evidence(region=_outward(one.bbox_px), answer=phrase, confidence=one.score, artifact=uri)
        for one in boxes.objects[: MAX_EVIDENCE - 1]
    ]
    how = (
        f"Counted from the boxes that ground finds for {phrase!r}; the confidence is the mean chance that a box is "
        "right and knows nothing of what was missed."
        if scores
        else f"ground finds no box of {phrase!r}; the confidence is the chance that its best candidate is none."
    )
    return VqaResult(
        answer=str(boxes.count), kind="count", confidence=confidence, abstained=confidence < _UNSURE, alternatives=[],
        evidence=[whole, *each], **_carried(boxes, how),
    )  # fmt: skip


def covered(phrase: str, region: Sequence[int], mask: SegmentResult, painted: Painted) -> VqaResult:
    """The area of a mask's one class. Confidence: its pixels' mean probability (of single pixels alone their highest);
    of none, that the likeliest errs."""
    found = mask.classes[0]
    pixels = sum(area.pixels for area in painted.areas)
    mean = painted.highest[0] if found.pixels else 1 - painted.highest[0]
    if pixels:
        mean = sum(area.score * area.pixels for area in painted.areas) / pixels
    answer = "unknown: a part of it has no place on Earth" if found.area_m2 is None else f"{found.area_m2:.0f}m2"
    whole = Evidence(
        region=list(region),
        answer=f"{found.share:.2%} of the pixels with data are {phrase!r}",
        confidence=mean,
        artifact=mask.artifacts[0].uri,
    )
    how = (
        f"Measured on the mask that segment makes of {phrase!r}; the confidence is the mean probability of its pixels."
        if found.pixels
        else f"segment finds no pixel of {phrase!r}; the confidence is the chance that the likeliest pixel is none."
    )
    return VqaResult(
        answer=answer, kind="area", confidence=mean, abstained=mean < _UNSURE or found.area_m2 is None,
        alternatives=[], evidence=[whole], **_carried(mask, how),
    )  # fmt: skip


def _carried(found: Result, how: str) -> dict:
    return {
        "georeferenced": found.georeferenced,
        "warnings": [*found.warnings, how],
        "artifacts": found.artifacts,
        "provenance": found.provenance,
    }


def _outward(box: Sequence[float]) -> list[int]:
    x1, y1, x2, y2 = box
    return [math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)]
