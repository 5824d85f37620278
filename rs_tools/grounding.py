"""From the boxes of overlapping tiles to the objects of a scene: merged, cut at a score, placed and written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_server.protocol import TileObjects
from model_server.relations import Relation
from rs_tools.artifacts.features import Feature, decimals
from rs_tools.calls import Call, Output, common
from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.merging import Detections, merge
from rs_tools.geometry.vectors import box_polygons, placed
from rs_tools.looking import Seen
from rs_tools.preview import MAX_SIDE, Marked, render
from rs_tools.results import Artifact, GroundedObject, GroundResult

# Part of an object that a tile cuts may score less than the whole does; below this share of the limit it is noise.
_PARTS_FROM = 0.5


@dataclass(frozen=True)
class Found:
    """The objects of a region, best first.

    Attributes:
        boxes: float [N, 4] x1, y1, x2, y2 in scene pixels.
        scores: float [N].
        limit: the score that they reach.
        best_below: score of the best candidate that does not; 0: there is none.
        known: whether the model knows what was asked for.
    """

    boxes: np.ndarray
    scores: np.ndarray
    limit: float
    best_below: float
    known: bool


def found_in(call: Call, seen: Seen[TileObjects], min_score: float, relation: Relation | None = None) -> Found:
    """Each object once, or the one that a relation singles out. `min_score` 0: at the model's own threshold."""
    looks, region = seen.looks, call.region
    limit = min_score or max((look.answer.threshold for look in looks), default=0.0)
    frames = [TileFrame(look.region, call.looks.finest.size(look.region)) for look in looks]
    boxes, scores, labels = [], [], []
    for look in looks:
        own = np.array(look.answer.scores, float)
        kept = own >= _PARTS_FROM * limit
        boxes.append(np.array(look.answer.boxes, float).reshape(-1, 4)[kept])
        scores.append(own[kept])
        labels.append([""] * len(scores[-1]))
    merged = merge(Detections.in_tiles(frames, boxes, scores, labels, region))
    sizes = merged.boxes[:, 2:] - merged.boxes[:, :2]
    good = (merged.scores >= limit) & (sizes > 0).all(axis=1)
    below = [score for look in looks for score in look.answer.scores if score < limit]
    boxes, scores = merged.boxes[good], merged.scores[good]
    if relation is not None and len(boxes):
        row = relation.pick(boxes, scores, region)
        boxes, scores = boxes[row : row + 1], scores[row : row + 1]
    return Found(boxes, scores, limit, max(below, default=0.0), all(one.answer.known for one in looks))


def grounded(call: Call, query: str, max_objects: int, found: Found, seen: Seen[TileObjects]) -> GroundResult:
    """The answer without its files."""
    shown = found.boxes[:max_objects]
    georeference = call.scene.georeference
    rings = georeference.rings(shown) if georeference is not None and len(shown) else [None] * len(shown)
    digits = decimals(call.gsd_m)
    objects = [
        GroundedObject(
            label=query,
            score=round(float(score), 4),
            bbox_px=[round(side, 2) for side in box.tolist()],
            polygon_lonlat=None if ring is None else np.round(ring, digits).tolist(),
        )
        for box, score, ring in zip(shown, found.scores[:max_objects], rings, strict=True)
    ]
    return GroundResult(
        objects=objects, count=len(found.boxes), **common(call, seen, _said(query, max_objects, found, seen))
    )


def written(call: Call, output: Output, query: str, found: Found, result: GroundResult) -> list[Artifact]:
    """All objects as a file of vectors, and a picture of them where one is asked for."""
    georeference = call.scene.georeference
    polygons = box_polygons(found.boxes)
    geometries = polygons if georeference is None else placed(polygons, georeference)
    features = [
        Feature(geometry, {"label": query, "score": round(float(score), 4), "bbox_px": np.round(box, 2).tolist()})
        for geometry, score, box in zip(geometries, found.scores, found.boxes, strict=True)
    ]
    lonlat = georeference is not None
    files = [output.store.vectors(features, result.provenance, result.warnings, lonlat=lonlat, gsd_m=call.gsd_m)]
    if output.preview:
        marked = [Marked(query, float(s), b.tolist()) for s, b in zip(found.scores, found.boxes, strict=True)]
        rgb = call.scene.read(call.region, picture_size(call)).rgb
        files.append(output.store.preview(render(rgb, call.region, marked, across_m=call.across_m)))
    return files


def picture_size(call: Call) -> tuple[int, int]:
    """(width, height) that a picture of the region is read in."""
    x1, y1, x2, y2 = call.region
    scale = max(1.0, max(x2 - x1, y2 - y1) / MAX_SIDE)
    return max(1, round((x2 - x1) / scale)), max(1, round((y2 - y1) / scale))


def _said(query: str, max_objects: int, found: Found, seen: Seen[TileObjects]) -> list[str]:
    warnings = []
    if not seen.looks:
        return warnings
    if not found.known:
        warnings.append(
            f"The model does not know {query!r}: the phrase is far from everything that it was trained on, so what it "
            "finds or misses is unreliable. Try a plainer word, such as 'ship', 'car', 'building' or 'tree'."
        )
    if len(found.boxes) == 0:
        best = f"; the best candidate has {found.best_below:.2f}, and min_score sets the limit" * (found.best_below > 0)
        warnings.append(f"No {query!r} was found with a score of {found.limit:.2f} or more{best}.")
    if len(found.boxes) > max_objects:
        warnings.append(
            f"{len(found.boxes)} objects were found; the {max_objects} best are listed, all are in the vectors file."
        )
    return warnings
