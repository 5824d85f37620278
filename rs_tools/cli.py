"""`rs-tools`: the same answers as over MCP, for scripts and people at a terminal."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from rs_tools import looking
from rs_tools.client import ModelClient
from rs_tools.errors import ArtifactError, PerceptionError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.results import ClassifyResult, InspectResult, ListResult, Result
from rs_tools.summary import summarize
from rs_tools.tools import Tools

EXIT_REFUSED = 1  # the image, the region or the question cannot be answered; typer exits with 2 on wrong usage

app = typer.Typer(
    help="Look at satellite and aerial images: inspect, list, caption, vqa, classify, ground, segment, detect-change."
    "\n\n"
    "The first question starts a model server for this user, which stays ready for a while.",
    epilog="Exit status: 0 answered, 1 the image or question was refused (the reason is on stderr), 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Image = Annotated[Path, typer.Argument(help="Path of the image: GeoTIFF, PNG, JPEG, ...", show_default=False)]
Region = Annotated[
    tuple[int, int, int, int] | None,
    typer.Option(metavar="X1 Y1 X2 Y2", help="Pixels from the top-left corner; the whole image without it."),
]
Bands = Annotated[
    list[int] | None,
    typer.Option(
        "--band", metavar="N", help="Band to show, from 1: once for grey, or for red, green and blue in turn."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Put the files there, named after the image; else they are kept a day in your cache."
    ),
]
Preview = Annotated[bool, typer.Option("--preview", help="Also make a picture of the answer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")]


@app.command(epilog="Example: rs-tools inspect scene.tif")
def inspect(image: Image, band: Bands = None, as_json: AsJson = False) -> None:
    """Size, bands, coordinate reference system, place and metres per pixel of IMAGE."""
    _run(image.parent, lambda tools, _: tools.inspect_image(_name(image), band or []), as_json)


@app.command("list", epilog="Example: rs-tools list ~/imagery")
def list_images(
    folder: Annotated[Path, typer.Argument(help="Folder to look in.")] = Path("."), as_json: AsJson = False
) -> None:
    """The images in FOLDER that the other commands can read."""
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder")
    _run(folder, lambda tools, _: tools.list_images(), as_json)


@app.command(epilog="Example: rs-tools caption scene.tif --region 0 0 512 512")
def caption(
    image: Image,
    region: Region = None,
    detail: Annotated[Literal["short", "full"], typer.Option(help="One sentence, or more of what is seen.")] = "short",
    band: Bands = None,
    as_json: AsJson = False,
) -> None:
    """Say in words what IMAGE shows."""
    _run(
        image.parent,
        lambda tools, progress: tools.caption(_name(image), _pixels(region), detail, band or [], progress),
        as_json,
    )


@app.command(epilog='Example: rs-tools vqa scene.tif "Is there a river?"')
def vqa(
    image: Image,
    question: Annotated[str, typer.Argument(help="One question about what is visible.", show_default=False)],
    region: Region = None,
    band: Bands = None,
    as_json: AsJson = False,
) -> None:
    """Answer QUESTION about IMAGE, with a calibrated confidence."""
    _run(
        image.parent,
        lambda tools, progress: tools.vqa(_name(image), question, _pixels(region), band or [], progress),
        as_json,
    )


@app.command(epilog="Example: rs-tools classify scene.tif --label forest --label farmland --label city")
def classify(
    image: Image,
    label: Annotated[
        list[str] | None, typer.Option(help="A class to choose from; repeat it. The model's own classes without it.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many of the likeliest classes to print.")] = 5,
    region: Region = None,
    band: Bands = None,
    as_json: AsJson = False,
) -> None:
    """Which scene class IMAGE belongs to."""
    _run(
        image.parent,
        lambda tools, progress: tools.classify(
            _name(image), label or [], top_k, _pixels(region), band or [], progress
        ),
        as_json,
    )


@app.command(epilog="Example: rs-tools ground harbour.tif ship --out found")
def ground(
    image: Image,
    query: Annotated[str, typer.Argument(help="What to find, such as ship.", show_default=False)],
    region: Region = None,
    max_objects: Annotated[int, typer.Option(help="How many to list; the file holds all.")] = 100,
    min_score: Annotated[float, typer.Option(help="Least score; 0 is the model's own threshold.")] = 0.0,
    band: Bands = None,
    preview: Preview = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find every QUERY in IMAGE: boxes, places and scores."""
    _run(
        image.parent,
        lambda tools, progress: tools.ground(
            _name(image), query, _pixels(region), max_objects, min_score, band or [], preview, progress
        ),
        as_json,
        _Kept(out, f"{image.stem}-ground"),
    )


@app.command(epilog="Example: rs-tools segment scene.tif --class water --class forest --out maps")
def segment(
    image: Image,
    classes: Annotated[list[str], typer.Option("--class", help="A kind of cover; repeat it.", show_default=False)],
    region: Region = None,
    band: Bands = None,
    preview: Preview = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Map which pixels of IMAGE are of which class."""
    _run(
        image.parent,
        lambda tools, progress: tools.segment(
            _name(image), classes, _pixels(region), band or [], preview, progress
        ),
        as_json,
        _Kept(out, f"{image.stem}-segment"),
    )


@app.command("detect-change", epilog="Example: rs-tools detect-change city_2019.tif city_2024.tif --out changes")
def detect_change(
    before: Annotated[Path, typer.Argument(help="The earlier image.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The later image of the same place.", show_default=False)],
    query: Annotated[str, typer.Option(help="Kind of change asked for; any without it.")] = "",
    region: Region = None,
    band: Bands = None,
    preview: Preview = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What changed from BEFORE to AFTER, in pixels of BEFORE."""
    _run(
        [before.parent, after.parent],
        lambda tools, progress: tools.detect_change(
            _name(before), _name(after), query, _pixels(region), band or [], preview, progress
        ),
        as_json,
        _Kept(out, f"{before.stem}-{after.stem}-change"),
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: rs-tools serve --help",
)
def serve(context: typer.Context) -> None:
    """Run the model server in the foreground; the options are those of rs-model-server."""
    # A process of its own in place of this one: the tools never load torch.
    os.execv(sys.executable, [sys.executable, "-m", "model_server.app", *context.args])


@app.command(epilog="Example: rs-tools doctor --root ~/imagery")
def doctor(
    root: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder that images are to be read from; repeatable.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint of the local model server.")] = None,
    model_url: Annotated[str | None, typer.Option(metavar="URL", help="A model server that runs elsewhere.")] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Its bearer token.")] = None,
    artifacts: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the files of answers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the installation and say how to mend what is wrong. Give it the options that you give to rs-mcp.

    Exit status: 0 where everything works (there may be warnings), 1 where there is a problem.
    """
    from rs_tools.doctor import Setup, examine

    try:
        token = token_file.read_text().strip() if token_file else None
    except OSError as error:
        raise typer.BadParameter(f"--token-file cannot be read: {error}") from error
    report = examine(Setup(tuple(root or ()), weights, model_url, token, artifacts))
    print(report.to_json() if as_json else report.to_text())
    raise typer.Exit(report.status == "problem")


def _name(image: Path) -> str:
    return str(image.absolute())


def _pixels(region: tuple[int, int, int, int] | None) -> list[int]:
    return [] if region is None else list(region)


_Ask = Callable[[Tools, looking.Progress], Awaitable[Result]]


@dataclass(frozen=True)
class _Kept:
    """Where a caller wants the files of an answer, and what their names begin with."""

    folder: Path | None = None
    stem: str = ""

    def keep(self, result: Result) -> None:
        """Copy the files; raises ArtifactError where that fails."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in result.artifacts:
                target = self.folder / f"{self.stem}{file.name[file.name.index('.') :]}"
                for suffix in ("", ".aux.xml"):  # class names that a GeoTIFF cannot hold
                    if Path(file.path + suffix).exists():
                        shutil.copyfile(file.path + suffix, f"{target}{suffix}")
                file.path = str(target)
        except OSError as error:
            raise ArtifactError(f"The files cannot be put into {self.folder}: {error.strerror}.") from error


def _run(folder: Path | list[Path], ask: _Ask, as_json: bool, kept: _Kept | None = None) -> None:
    """Ask with these folders as the allowed roots: whoever names a file at a terminal may read it."""
    folders = folder if isinstance(folder, list) else [folder]
    try:
        result = asyncio.run(_asked(AccessPolicy([one.absolute() for one in folders]), ask))
        if kept is not None:
            kept.keep(result)
    except PerceptionError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(EXIT_REFUSED) from error
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        _show(result)


async def _asked(policy: AccessPolicy, ask: _Ask) -> Result:
    client = ModelClient()
    try:
        with _bar() as progress:
            return await ask(Tools(policy, client), progress)
    finally:
        await client.aclose()


@contextmanager
def _bar() -> Iterator[looking.Progress]:
    """A bar on the terminal where there is more than one look; nothing where stderr is no terminal."""
    columns = TextColumn("looking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking", total=None, visible=False)

        def heard(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total, visible=total > 1)

        yield heard


def _show(result: Result) -> None:
    console = Console(soft_wrap=True)
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
        "modality": f"{result.modality} ({result.modality_reason})",
    }


def main() -> None:
    app()


if __name__ == "__main__":
    main()
