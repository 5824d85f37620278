"""Make checkpoints, and verify loaders of published ones: `python -m model_server.checkpoints --help`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.callback()
def checkpoints() -> None:
    """Make and inspect checkpoints."""


@app.command()
def debug(
    folder: Annotated[Path, typer.Argument(help="where to write it; made if missing")],
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write a checkpoint of the `debug` config: the real architecture, tiny, untrained."""
    from model_server.checkpoints.debug import write_debug_checkpoint

    write_debug_checkpoint(folder, seed)
    typer.echo(f"wrote {folder}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="recorded results of a published checkpoint, and the checkpoint")],
) -> None:
    """Load a published checkpoint and compare all that is recorded of it; exit 1 where it differs."""
    from model_server.checkpoints.store import WeightsError
    from model_server.checkpoints.verify import lines
    from model_server.checkpoints.verify import verify as run

    try:
        found = run(folder)
    except WeightsError as error:
        typer.echo(f"FAILED: {error}")
        raise typer.Exit(1) from error
    typer.echo("\n".join(lines(found)))
    if not found.comparison.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
