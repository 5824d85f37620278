"""Commands around the tools: the model server, the doctor, the demonstration."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from rs_tools.commands.asking import EXIT_REFUSED, say_error
from rs_tools.commands.options import Model, ModelUrl, TokenFile, read_token

app = typer.Typer()

SCENES = Path(__file__).resolve().parents[2] / "examples" / "data"  # of a checkout
_LAKE, _TREES = str(SCENES / "itaipu_landsat8.tif"), str(SCENES / "ordway_swisher_neon.tif")
_TOUR = (
    ("list", str(SCENES)),
    ("inspect", _LAKE),
    ("classify", _LAKE, "--label", "reservoir", "--label", "desert", "--label", "airport"),
    ("vqa", _LAKE, "Is there water in this image?"),
    ("segment", _LAKE, "--class", "water", "--class", "forest", "--preview"),
    ("caption", _TREES),
    ("ground", _TREES, "tree", "--preview"),
    ("detect-change", _LAKE, _LAKE),
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: rs-tools serve --port 8765",
)
def serve(context: typer.Context) -> None:
    """Run the model server in the foreground; the options are those of rs-model-server.

    You need it only for a server on another machine or GPU: the other commands start one by themselves.
    """
    missing = [name for name in ("torch", "uvicorn", "starlette") if importlib.util.find_spec(name) is None]
    if missing:
        mend = f"{sys.executable} -m pip install 'rs-perception[server]'"
        say_error(f"a model server needs {', '.join(missing)}: {mend}")
        raise typer.Exit(EXIT_REFUSED)
    # A process of its own in place of this one: the tools never load torch.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "model_server.app", *context.args])


@app.command(epilog="Example: rs-tools doctor --root ~/imagery")
def doctor(
    root: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder that images are to be read from; repeatable.")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="DIR", help="Checkpoint of the local model server.")] = None,
    model_url: ModelUrl = None,
    token_file: TokenFile = None,
    model: Model = None,
    artifacts: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the files of answers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the installation and say how to mend what is wrong. Give it the options that you give to rs-mcp.

    Exit status: 0 where everything works (there may be warnings), 1 where there is a problem. Where rs-tools itself
    does not start, python -m rs_tools.doctor does the same.
    """
    from rs_tools.doctor import Setup, examine

    token = read_token(model_url, token_file)
    report = examine(Setup(tuple(root or ()), weights, model_url, token, model, artifacts))
    print(report.to_json() if as_json else report.to_text())
    raise typer.Exit(report.status == "problem")


@app.command(epilog="Example: rs-tools demo scene.tif")
def demo(
    context: typer.Context,
    image: Annotated[Path | None, typer.Argument(help="An image of yours; bundled scenes without it.")] = None,
) -> None:
    """Show what the other commands do: each is printed as you would type it, with its answer."""
    if image is None and not SCENES.is_dir():
        raise typer.BadParameter("the scenes are part of the project's checkout and not of its package: give an IMAGE")
    main = context.find_root().command.main
    status = 0
    for words in _TOUR if image is None else _own_tour(str(image)):
        typer.secho(f"\n$ rs-tools {shlex.join(words)}", bold=True)
        sys.stdout.flush()
        status = max(status, main(list(words), prog_name="rs-tools", standalone_mode=False) or 0)
    raise typer.Exit(status)


def _own_tour(image: str) -> list[tuple[str, ...]]:
    return [
        ("inspect", image),
        ("caption", image),
        ("classify", image, "--top-k", "3"),
        ("vqa", image, "Are there buildings?"),
        ("ground", image, "building", "--preview"),
        ("segment", image, "--class", "water", "--class", "forest", "--class", "road", "--preview"),
    ]
