"""From what was said of the parts of a region to one caption, one answer or one class."""

from __future__ import annotations

from typing import Literal

from model_server.protocol import TileCaption, TileClasses, TileVqa
from rs_tools.calls import NO_DATA, Call, common
from rs_tools.imagery.scene import Region
from rs_tools.imagery.tiling import OVERLAP, Looks, look_at_whole, look_closely, look_once
from rs_tools.looking import Seen
from rs_tools.reduction import Scope, reduce_answers, reduce_captions, reduce_classes
from rs_tools.results import (
    Alternative,
    CaptionPart,
    CaptionResult,
    ClassifyResult,
    ClassPart,
    ClassScore,
    Evidence,
    VqaResult,
)


def looks_for(scope: Scope, region: Region, gsd_m: float | None) -> Looks:
    """What answers a question: see the table in `reduction`."""
    match scope:
        case "presence":
            return look_closely(region, gsd_m, overview=True, overlap=OVERLAP)
        case "count" | "area":
            return look_closely(region, gsd_m, overview=False, overlap=0)
        case "once":
            return look_once(region)
        case "whole":
            return look_at_whole(region, gsd_m)


def captioned(call: Call, detail: Literal["short", "full"], seen: Seen[TileCaption]) -> CaptionResult:
    looks = seen.looks
    if not looks:
        return CaptionResult(caption=NO_DATA, parts=[], confidence=0, **common(call, seen))
    found = reduce_captions(looks, detail)
    return CaptionResult(
        caption=found.caption,
        parts=[CaptionPart(region=list(part.region), caption=part.answer.caption) for part in found.parts],
        confidence=found.confidence,
        **common(call, seen),
    )


def answered(call: Call, scope: Scope, seen: Seen[TileVqa]) -> VqaResult:
    looks = seen.looks
    if not looks:
        return VqaResult(
            answer=NO_DATA, kind="text", confidence=0, abstained=True, alternatives=[], evidence=[],
            **common(call, seen),
        )  # fmt: skip
    found = reduce_answers(scope, looks)
    return VqaResult(
        answer=found.answer,
        kind=found.kind,
        confidence=found.confidence,
        abstained=found.abstained,
        alternatives=[Alternative(answer=answer, confidence=share) for answer, share in found.alternatives],
        evidence=[
            Evidence(region=list(look.region), answer=look.answer.answer, confidence=look.answer.confidence)
            for look in found.evidence
        ],
        **common(call, seen, found.warnings),
    )


def classified(call: Call, top_k: int, seen: Seen[TileClasses]) -> ClassifyResult:
    looks = seen.looks
    if not looks:
        return ClassifyResult(label="", score=0, top=[], **common(call, seen))
    top = _ranked(reduce_classes(looks))
    parts = [ClassPart(region=list(look.region), **_ranked(reduce_classes([look]))[0]) for look in looks]
    return ClassifyResult(
        **top[0],
        top=[ClassScore(**one) for one in top[:top_k]],
        parts=parts if len(parts) > 1 else [],
        **common(call, seen),
    )


def _ranked(scores: dict[str, float]) -> list[dict]:
    """`label` and `score` of each class, best first."""
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])
    return [{"label": label, "score": min(1.0, score)} for label, score in ranked]
