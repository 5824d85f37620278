"""`python -m model_server.checkpoints debug DIR` writes a small random checkpoint."""

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


if __name__ == "__main__":
    app()
