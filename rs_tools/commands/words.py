"""Commands whose answers are words and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rs_tools.commands.asking import Subject, ask_all, each
from rs_tools.commands.options import AsJson, Bands, Images, KnownView, View, spread

app = typer.Typer()


@app.command(epilog="Example: rs-tools inspect scene.tif")
def inspect(images: Images, band: Bands = None, as_json: AsJson = False) -> None:
    """Size, bands, coordinate reference system, place and metres per pixel of each IMAGE."""
    each(images, lambda tools, image, *_: tools.inspect_image(image, band or []), View(as_json=as_json))


@app.command("list", epilog="Example: rs-tools list ~/imagery")
def list_images(
    folder: Annotated[Path, typer.Argument(help="Folder to look in.")] = Path("."), as_json: AsJson = False
) -> None:
    """The images in FOLDER that the other commands can read."""
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder")
    ask_all([Subject((folder,))], lambda tools, *_: tools.list_images(), View(as_json=as_json))


@app.command(epilog="Example: rs-tools caption scene.tif --region 0 0 512 512")
@spread
def caption(
    images: Images,
    detail: Annotated[Literal["short", "full"], typer.Option(help="One sentence, or more of what is seen.")] = "short",
    *,
    view: KnownView,
) -> None:
    """Say in words what each IMAGE shows."""
    each(
        images,
        lambda tools, image, region, progress: tools.caption(
            image, region, detail, view.bands, view.known, progress=progress
        ),
        view,
    )


@app.command(epilog='Example: rs-tools vqa scene.tif "Is there a river?"')
@spread
def vqa(
    images: Images,
    question: Annotated[str, typer.Argument(help="One question about what is visible.", show_default=False)],
    *,
    view: KnownView,
) -> None:
    """Answer QUESTION about each IMAGE, with a calibrated confidence."""
    each(
        images,
        lambda tools, image, region, progress: tools.vqa(
            image, question, region, view.bands, view.known, progress=progress
        ),
        view,
    )


@app.command(epilog="Example: rs-tools classify scene.tif --label forest --label farmland --label city")
@spread
def classify(
    images: Images,
    label: Annotated[
        list[str] | None, typer.Option(help="A class to choose from; repeat it. The model's own classes without it.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many of the likeliest classes to print.")] = 5,
    *,
    view: KnownView,
) -> None:
    """Which scene class each IMAGE belongs to."""
    each(
        images,
        lambda tools, image, region, progress: tools.classify(
            image, label or [], top_k, region, view.bands, view.known, progress=progress
        ),
        view,
    )
