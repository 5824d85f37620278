"""Arguments and options that commands share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rs_tools import endpoint
from rs_tools.errors import InputError
from rs_tools.upstream.choosing import MODEL_HELP, PROFILE_HELP, Upstream, chosen

if TYPE_CHECKING:  # what is heavy comes with the first question
    from rs_tools.tools import Tools

Images = Annotated[
    list[Path],
    typer.Argument(
        metavar="IMAGE", help="GeoTIFF, PNG, JPEG, ...; a folder, or a pattern in quotes.", show_default=False
    ),
]
Region = Annotated[
    tuple[float, float, float, float] | None,
    typer.Option(metavar="X1 Y1 X2 Y2", help="Pixels from the top-left corner; the whole image without it."),
]
Bounds = Annotated[
    tuple[float, float, float, float] | None,
    typer.Option(
        metavar="WEST SOUTH EAST NORTH", help="Instead of --region: its place in WGS84 degrees, for any of the images."
    ),
]
Bands = Annotated[
    list[int] | None,
    typer.Option(
        "--band", metavar="N", help="Band to show, from 1: once for grey, or for red, green and blue in turn."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the whole result as JSON; of many images one result to a line.")
]
Preview = Annotated[bool, typer.Option("--preview", help="Also make a picture of the answer.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Put the files there, named after the image; else they are kept a day in your cache."
    ),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="AlphaEarth raster of the place, or a folder of those of one year, for a model that is modulated by them.",
    ),
]


ModelUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Ask the model server there; without it this user's own one.")
]
TokenFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Bearer token of the server at --model-url.")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help=MODEL_HELP)]
Profile = Annotated[str | None, typer.Option(metavar="PROFILE", help=PROFILE_HELP)]


@dataclass(frozen=True, kw_only=True)
class View:
    """How each image is looked at, by which model, and how its answer is printed."""

    region: Region = None
    bounds: Bounds = None
    band: Bands = None
    model_url: ModelUrl = None
    token_file: TokenFile = None
    model: Model = None
    profile: Profile = None
    as_json: AsJson = False

    def __post_init__(self) -> None:
        if self.region is not None and self.bounds is not None:
            raise typer.BadParameter("--region and --bounds name the same thing; give one of them")

    async def region_in(self, tools: Tools, image: str) -> list[float]:
        """The region in the pixels of an image, empty for the whole."""
        return list(self.region or ()) if self.bounds is None else await tools.region_of(image, self.bounds)

    @property
    def bands(self) -> list[int]:
        return self.band or []

    @property
    def known(self) -> str:
        """Where the embeddings are; empty for none."""
        return ""

    @property
    def token(self) -> str | None:
        return read_token(self.model_url, self.token_file)

    @property
    def upstream(self) -> Upstream | None:
        """Another model's endpoint, where one is chosen."""
        try:
            return chosen(self.model_url, self.model, self.profile, self.token_file)
        except InputError as error:
            raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class FilesView(View):
    """The same for answers that come with files."""

    preview: Preview = False
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class KnownView(View):
    """The same of a place that something is known of."""

    embeddings: Embeddings = None

    @property
    def known(self) -> str:
        return "" if self.embeddings is None else str(self.embeddings.absolute())


@dataclass(frozen=True, kw_only=True)
class KnownFilesView(FilesView, KnownView):
    """Both."""


def read_token(model_url: str | None, file: Path | None) -> str | None:
    """The token of the server at `model_url`, which is looked at too."""
    if file is not None and model_url is None:
        raise typer.BadParameter("--token-file is for --model-url, which is not given")
    try:
        if model_url is not None:
            endpoint.base_url(model_url)
        return None if file is None else endpoint.read_token(file)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose last parameter is a view, as one whose last parameters are the fields of that view.

    So the options that commands share are declared once, and typer still sees each of them.
    """
    hints = get_type_hints(command, include_extras=True)
    *own, last = inspect.signature(command).parameters.values()
    kind: type[View] = hints[last.name]
    options = get_type_hints(kind, include_extras=True)
    fields = {field.name: field.default for field in dataclasses.fields(kind)}

    @wraps(command)
    def spread_out(**given: Any) -> None:
        view = kind(**{name: given.pop(name) for name in fields})
        command(**given, **{last.name: view})

    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=options[name])
        for name, default in fields.items()
    ]
    vars(spread_out)["__signature__"] = inspect.Signature(parameters)  # where inspect, and so typer, looks first
    spread_out.__annotations__ = {one.name: one.annotation for one in parameters}
    return spread_out
