"""From the painted mask of change to the answer of `detect_change`, its regions and its caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely

from model_server.change_words import ChangeFacts, place_in
from model_server.protocol import TileCaption, TileChange
from rs_tools.artifacts.features import decimals
from rs_tools.calls import NO_OVERLAP, Call, Output, common
from rs_tools.imagery.alignment import Shift
from rs_tools.looking import Seen
from rs_tools.painting import Area, Maps, Painted, Painter, figures, picture, vectors
from rs_tools.results import Artifact, ChangedRegion, DetectChangeResult, Ring
from rs_tools.summary import square_metres

CLASSES = ("changed",)
MAX_REGIONS = 30
_MAX_POINTS = 24
_SHIFTED = 1.0  # pixels; less is what warping and pixel grids do


def maps(answer: TileChange) -> Maps:
    """What a painter takes of an answer."""
    return Maps(answer.probabilities[None], [answer.threshold])


def detected(
    call: Call,
    painter: Painter,
    seen: Seen,
    painted: Painted | None,
    shift: Shift | None,
    scenes: Sequence[TileCaption],
    query: str,
) -> DetectChangeResult:
    """The answer without its files; `painted` is None while the mask is unfinished.

    `scenes`: the captions of the earlier and the later scene, or none.
    """
    pixels, share, area = figures(painter, 1)
    areas = painted.areas if painted is not None else []
    regions = _regions(call, areas[:MAX_REGIONS])
    pair = call.pair
    return DetectChangeResult(
        changed=bool(areas) if painted is not None else pixels > 0,
        caption=_caption(call, areas, pixels, share, area, seen, scenes),
        changed_share=share,
        changed_area_m2=area,
        overlap_share=pair.overlap_share if pair else 0.0,
        regions=regions,
        **common(call, seen, _said(painted, shift, query)),
    )


def written(call: Call, output: Output, painted: Painted, result: DetectChangeResult) -> list[Artifact]:
    """The mask, its outlines, and a picture of it over the later image where one is asked for."""
    outlines = vectors(output.store, call, painted.areas, CLASSES, result.provenance, result.warnings)
    files = [painted.mask, outlines]
    return [*files, picture(call, output, painted.mask, CLASSES)] if output.preview else files


def _regions(call: Call, areas: Sequence[Area]) -> list[ChangedRegion]:
    georeference = call.scene.georeference
    outlines = [_short(area.outline) for area in areas]
    rings: Sequence[Ring | None] = [None] * len(areas)
    if georeference is not None and areas:
        rings = georeference.outlines(outlines)
    digits = decimals(call.gsd_m)
    return [
        ChangedRegion(
            score=round(area.score, 4),
            bbox_px=list(area.bbox),
            polygon_lonlat=None if ring is None else np.round(ring, digits).tolist(),
            area_m2=area.area_m2,
        )
        for area, ring in zip(areas, rings, strict=True)
    ]


def _short(polygon: shapely.Polygon) -> np.ndarray:
    """The exterior in few points, float [n, 2]; the bounding box where it cannot be said in few."""
    tolerance = 1.0
    largest = max(polygon.bounds[2] - polygon.bounds[0], polygon.bounds[3] - polygon.bounds[1])
    ring = polygon.exterior
    while len(ring.coords) > _MAX_POINTS and tolerance < largest / 2:
        tolerance *= 1.5
        simple = shapely.simplify(shapely.Polygon(polygon.exterior), tolerance, preserve_topology=True)
        ring = simple.exterior if isinstance(simple, shapely.Polygon) and not simple.is_empty else ring
    if len(ring.coords) > _MAX_POINTS:
        ring = shapely.box(*polygon.bounds).exterior
    return np.asarray(ring.coords)[:, :2]


def _caption(
    call: Call,
    areas: Sequence[Area],
    pixels: int,
    share: float,
    area: float | None,
    seen: Seen,
    scenes: Sequence[TileCaption],
) -> str:
    if not seen.valid:
        return NO_OVERLAP
    if not areas:
        return "No change was found." if not pixels else "No change was found but for single pixels."
    largest = areas[0]
    place = place_in(largest.bbox, call.region)
    facts = ChangeFacts(len(areas), share, largest.pixels / pixels, place)
    text = facts.said("" if area is None else square_metres(area))
    if len(scenes) == 2:
        before, after = (_inline(one.caption) for one in scenes)
        text += f" The model describes the earlier image as {before} and the later one as {after}."
    return text


def _inline(caption: str) -> str:
    return f'"{caption.strip().rstrip(".")}"'


def _said(painted: Painted | None, shift: Shift | None, query: str) -> list[str]:
    warnings = []
    if query:
        warnings.append(
            f"The model does not tell kinds of change apart: every change is reported, whether or not it is {query!r}."
        )
    if shift is not None and max(abs(shift.x), abs(shift.y)) > _SHIFTED:
        warnings.append(
            f"The later image seems to lie {shift.x:+.1f} pixels to the right and {shift.y:+.1f} down of the earlier "
            f"one ({shift.windows} of {shift.tried} windows agree). It was not moved: thin changes along edges may "
            "come from that."
        )
    if painted is not None:
        warnings += painted.warnings
    if painted is not None and len(painted.areas) > MAX_REGIONS:
        warnings.append(
            f"{len(painted.areas)} regions changed; the {MAX_REGIONS} largest are listed, and the vectors file holds "
            f"{'the largest' if painted.left_out else 'all'}."
        )
    return warnings
