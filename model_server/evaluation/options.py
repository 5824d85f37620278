"""Arguments and options that commands on labelled data share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from model_server.training.records import set_names

Data = Annotated[Path, typer.Argument(help="folder of sets, each with a records.jsonl")]
Sets = Annotated[str, typer.Option(help="comma-separated")]
Split = Annotated[str, typer.Option()]
Weights = Annotated[Path, typer.Option(help="checkpoint; default the embedded one")]
Limit = Annotated[int | None, typer.Option(help="this many images of each set, evenly spread", min=1)]


def named(sets: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in sets.split(",") if name.strip()]


def held(data: Path, sets: Iterable[str]) -> list[str]:
    """Those of the sets that the folder holds. Raises BadParameter where it holds none of them."""
    wanted, there = list(sets), set_names(data)
    names = [name for name in wanted if name in there]
    if not names:
        raise typer.BadParameter(f"{data} holds none of {', '.join(wanted)}; it has: {', '.join(there) or 'none'}")
    return names
