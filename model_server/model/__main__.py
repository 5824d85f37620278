"""Look at models without building them: `python -m model_server.model --help`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from model_server.model.presets import NAMED

app = typer.Typer(help=__doc__, no_args_is_help=True)


class Precision(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command()
def describe(
    config: Annotated[str, typer.Argument(help=f"one of {', '.join(NAMED)}")],
    precision: Annotated[Precision, typer.Option(help="of weights and cache")] = Precision.BFLOAT16,
    context: Annotated[int, typer.Option(min=1, help="tokens of a sequence")] = 2048,
) -> None:
    """Print a config's parts, parameters, operations and memory. Nothing is allocated or downloaded."""
    if config not in NAMED:
        raise typer.BadParameter(f"there is no config {config!r}; the configs are {', '.join(NAMED)}")
    from rich.console import Console

    from model_server.model.describe import describe as run
    from model_server.model.tables import print_description

    print_description(run(NAMED[config](), context), precision, Console())


@app.command()
def attention(
    head_width: Annotated[int, typer.Option(min=1, help="channels of a head")] = 64,
) -> None:
    """Say which attention backends this machine has, and why it has not the others."""
    import torch
    from rich.console import Console

    from model_server.model.backends import Call
    from model_server.model.tables import print_backends

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    q = torch.empty(1, head_width, dtype=dtype, device="cuda" if cuda else "cpu")
    print_backends(Call.of(q, "causal"), Console())


if __name__ == "__main__":
    app()
