"""Answers in a few words, for a reader who does not open the structured result: an agent's chat, a terminal."""

from __future__ import annotations

from functools import singledispatch

from rs_tools.results import (
    CaptionResult,
    ClassifyResult,
    DetectChangeResult,
    GroundResult,
    InspectResult,
    ListResult,
    Result,
    SegmentResult,
    VqaResult,
)

LISTED_IMAGES = 30
_SHOWN_EVIDENCE = 3
_SHOWN_OBJECTS = 5
_SHOWN_REGIONS = 5


def summarize(result: Result) -> str:
    """The answer in one to a few lines, its warnings after it, a line each."""
    return "\n".join([headline(result), *(f"Warning: {warning}" for warning in result.warnings)])


@singledispatch
def headline(result: Result) -> str:
    """The answer without its warnings."""
    raise TypeError(f"no summary is written for {type(result).__name__}")


@headline.register
def _(result: InspectResult) -> str:
    bands = "1 band" if result.band_count == 1 else f"{result.band_count} bands"
    lines = [f"{result.width} x {result.height} pixels, {bands} of {result.dtype}, {result.modality}."]
    if result.bounds_wgs84 is not None:
        west, south, east, north = result.bounds_wgs84
        crs = f"EPSG:{result.epsg}" if result.epsg is not None else "a CRS without EPSG code"
        pixel = f", {_metres(result.gsd_m)} per pixel" if result.gsd_m is not None else ""
        covered = f", {square_metres(result.area_km2 * 1e6)} of ground" if result.area_km2 is not None else ""
        lines.append(f"{crs}{pixel}{covered}; west {west:.5f}, south {south:.5f}, east {east:.5f}, north {north:.5f}.")
    elif not result.georeferenced:
        lines.append("Not georeferenced: only pixel coordinates are known.")
    return "\n".join(lines)


@headline.register
def _(result: ListResult) -> str:
    if not result.images:
        return f"No image found. Images may be read from: {', '.join(result.roots)}."
    lines = [
        f"{image.image}  {image.width} x {image.height}, {image.band_count} x {image.dtype}, {_bytes(image.bytes)}"
        for image in result.images[:LISTED_IMAGES]
    ]
    if len(result.images) > LISTED_IMAGES:
        lines.append(f"and {len(result.images) - LISTED_IMAGES} more (all are in the structured result)")
    if result.truncated:
        lines.append("There are more images than can be listed: name a folder to see them.")
    return "\n".join(lines)


@headline.register
def _(result: CaptionResult) -> str:
    looked = f", reduced from {len(result.parts)} parts" if result.parts else ""
    return f"{result.caption} (confidence {result.confidence:.2f}{looked})"


@headline.register
def _(result: VqaResult) -> str:
    said = f"{result.answer} (confidence {result.confidence:.2f})"
    if result.abstained:
        said = f"Not certain enough to rely on: {said}"
    if len(result.evidence) > 1:
        regions = ", ".join(str(one.region) for one in result.evidence[:_SHOWN_EVIDENCE])
        said += f"; it rests most on {regions}"
    if result.alternatives:
        others = ", ".join(f"{other.answer} {other.confidence:.2f}" for other in result.alternatives)
        said += f"; other answers: {others}"
    return said


@headline.register
def _(result: ClassifyResult) -> str:
    if not result.label:
        return "No class: there is nothing to see in this region."
    others = ", ".join(f"{other.label} {other.score:.2f}" for other in result.top[1:])
    looked = f", from {len(result.parts)} looks" if result.parts else ""
    return f"{result.label} (probability {result.score:.2f}{looked})" + (f"; then {others}" if others else "")


@headline.register
def _(result: GroundResult) -> str:
    if not result.count:
        return "Nothing was found."
    shown = [f"{_box(one.bbox_px)} score {one.score:.2f}" for one in result.objects[:_SHOWN_OBJECTS]]
    what = result.objects[0].label if result.objects else "object"
    first = "; the best are " if result.count > len(shown) else ": "
    return f"{result.count} found for {what!r}{first}{', '.join(shown)}"


@headline.register
def _(result: SegmentResult) -> str:
    if not any(one.pixels for one in result.classes):
        return "None of the classes was found."
    return "; ".join(
        f"{one.label} {one.share:.1%}" + ("" if one.area_m2 is None else f" ({square_metres(one.area_m2)})")
        for one in result.classes
    )


@headline.register
def _(result: DetectChangeResult) -> str:
    shown = [f"{_box(one.bbox_px)} score {one.score:.2f}" for one in result.regions[:_SHOWN_REGIONS]]
    largest = "Largest regions" if len(result.regions) > len(shown) else "Regions"
    return result.caption + (f" {largest}: {', '.join(shown)}" if shown else "")


def square_metres(value: float) -> str:
    """An area in words: square metres, or square kilometres from a tenth of one."""
    return f"{value:.3g} m2" if value < 1e3 else f"{value:,.0f} m2" if value < 1e5 else f"{value / 1e6:,.3g} km2"


def _box(sides: list[float] | list[int]) -> str:
    return f"[{', '.join(f'{side:.0f}' for side in sides)}]"


def _metres(value: float) -> str:
    return f"{value:.3g} m" if value < 1000 else f"{value / 1000:.3g} km"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(size / 1e3, 0.1):.1f} kB"
