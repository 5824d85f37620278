"""Answers on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from rs_tools.results import ClassifyResult, InspectResult, ListResult, Result
from rs_tools.summary import summarize


def show(result: Result, about: str = "") -> None:
    """Print an answer; `about`: the image that it is about, where there are several."""
    console = Console(soft_wrap=True)
    if about:
        console.print(f"[bold cyan]{escape(about)}[/]", highlight=False)
    if isinstance(result, InspectResult | ListResult | ClassifyResult):
        console.print(_table(result))
        for warning in result.warnings:
            console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
    else:
        console.print(escape(summarize(result)), highlight=False)
    for file in result.artifacts:
        console.print(f"[bold]{file.kind}[/] {escape(file.path)}", highlight=False)


def _table(result: InspectResult | ListResult | ClassifyResult) -> Table:
    match result:
        case ClassifyResult():
            table = Table("class", "probability", box=None)
            for one in result.top:
                table.add_row(escape(one.label), f"{one.score:.3f}")
        case ListResult():
            table = Table(Column("image", overflow="fold"), "size", "bands", "type", box=None)
            for image in result.images:
                size = f"{image.width} x {image.height}"
                table.add_row(escape(image.image), size, str(image.band_count), image.dtype)
        case InspectResult():
            table = Table(show_header=False, box=None)
            for name, value in _facts(result).items():
                table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def _facts(result: InspectResult) -> dict[str, str]:
    bands = ", ".join(f"{band.index} {band.description or band.color}" for band in result.bands)
    place = ", ".join(f"{degrees:.6f}" for degrees in result.bounds_wgs84 or [])
    crs = "none" if result.crs_wkt is None else f"EPSG:{result.epsg}" if result.epsg else "without EPSG code"
    return {
        "size": f"{result.width} x {result.height} pixels",
        "bands": f"{bands} ({result.dtype})",
        "nodata": "none" if result.nodata is None else str(result.nodata),
        "crs": crs,
        "west, south, east, north": place or "unknown",
        "metres per pixel": "unknown" if result.gsd_m is None else f"{result.gsd_m:.3g}",
        "square kilometres": "unknown" if result.area_km2 is None else f"{result.area_km2:.4g}",
        "modality": f"{result.modality} ({result.modality_reason})",
    }
