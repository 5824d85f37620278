"""Commands whose answers have places: boxes, masks and change, with files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rs_tools.commands.asking import each, each_pair
from rs_tools.commands.options import FilesView, Images, KnownFilesView, spread

app = typer.Typer()


@app.command(epilog="Example: rs-tools ground harbour.tif ship --out found")
@spread
def ground(
    images: Images,
    query: Annotated[str, typer.Argument(help="What to find, such as ship.", show_default=False)],
    max_objects: Annotated[int, typer.Option(help="How many to list; the file holds all.")] = 100,
    min_score: Annotated[float, typer.Option(help="Least score; 0 is the model's own threshold.")] = 0.0,
    *,
    view: KnownFilesView,
) -> None:
    """Find every QUERY in each IMAGE: boxes, places and scores."""
    each(
        images,
        lambda tools, image, region, progress: tools.ground(
            image, query, region, max_objects, min_score, view.bands, view.preview, view.known, progress=progress
        ),
        view,
        "ground",
    )


@app.command(epilog="Example: rs-tools segment scene.tif --class water --class forest --out maps")
@spread
def segment(
    images: Images,
    classes: Annotated[list[str], typer.Option("--class", help="A kind of cover; repeat it.", show_default=False)],
    *,
    view: FilesView,
) -> None:
    """Map which pixels of each IMAGE are of which class."""
    each(
        images,
        lambda tools, image, region, progress: tools.segment(
            image, classes, region, view.bands, view.preview, progress=progress
        ),
        view,
        "segment",
    )


@app.command("detect-change", epilog="Example: rs-tools detect-change city_2019.tif city_2024.tif --out changes")
@spread
def detect_change(
    before: Annotated[Path, typer.Argument(help="The earlier image, or a folder of them.", show_default=False)],
    after: Annotated[
        Path, typer.Argument(help="The later image of the place, or a folder of the same names.", show_default=False)
    ],
    query: Annotated[str, typer.Option(help="Kind of change asked for; any without it.")] = "",
    *,
    view: FilesView,
) -> None:
    """What changed from BEFORE to AFTER, in pixels of BEFORE."""
    each_pair(
        before,
        after,
        lambda tools, early, late, region, progress: tools.detect_change(
            early, late, query, region, view.bands, view.preview, progress=progress
        ),
        view,
        "change",
    )
