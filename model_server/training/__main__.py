"""`python -m model_server.training DATA_DIR --run DIR`: train the model, stage after stage, and write its weights.

Each stage saves checkpoints in the run's folder and goes on from there when the command is given again. Nothing but
torch, numpy, safetensors, tokenizers, Pillow, typer and rich is needed.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from model_server.training import processes
from model_server.training.answers import AnswersRun, AnswersTrainer
from model_server.training.dense import DenseRun, DenseTrainer
from model_server.training.export import calibrate, export
from model_server.training.language import SETS, LanguageRun, LanguageTrainer
from model_server.training.place import Device, on
from model_server.training.polish import Polisher, PolishRun
from model_server.training.vision import VisionRun, VisionTrainer


class Stage(StrEnum):
    """In this order; each needs the one before it."""

    VISION = "vision"
    LANGUAGE = "language"
    POLISH = "polish"
    ANSWERS = "answers"
    DENSE = "dense"
    EXPORT = "export"


def train(
    data: Annotated[Path, typer.Argument(help="directory of record sets: ucm, rsicd_aid, rsvqa_lr, rsvqa_hr")],
    run: Annotated[Path, typer.Option(help="folder of this run: checkpoints, logs, weights/")] = Path("runs/nano"),
    config: Annotated[str, typer.Option(help="nano, or debug for a run of seconds")] = "nano",
    stage: Annotated[list[Stage] | None, typer.Option(help="only these stages; default: all, in order")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of each stage instead of its own number")] = None,
    batch: Annotated[int | None, typer.Option(help="images a step instead of the stage's own number")] = None,
    seed: Annotated[int, typer.Option(help="of weights, order and views")] = 0,
    limit: Annotated[int | None, typer.Option(help="use about this many images of each split")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice")] = None,
    device: Annotated[
        Device, typer.Option(help="of all stages but export; auto: a GPU where there is one")
    ] = Device.AUTO,
) -> None:
    """Train the model on a directory of labelled sets. The weights end in RUN/weights.

    Example: python -m model_server.training ../data --run runs/nano
    """
    if threads:
        torch.set_num_threads(threads)
    given = {k: v for k, v in {"steps": steps, "batch": batch}.items() if v is not None}
    shared = {"data": data, "run": run, "config": config, "seed": seed, "limit": limit, **given}
    with processes.joined():
        for name in stage or list(Stage):
            typer.echo(f"stage {name}")
            match name:
                case Stage.VISION | Stage.LANGUAGE | Stage.POLISH | Stage.ANSWERS:
                    with on(device):
                        words(name, shared)
                case Stage.DENSE:
                    with on(device):
                        DenseTrainer(DenseRun(**shared)).fit()
                case Stage.EXPORT:
                    trainer = LanguageTrainer(LanguageRun(**shared))  # by all: they wait there for each other
                    if processes.is_main():
                        finish(trainer, DenseRun(**shared))
            processes.wait()  # the next stage reads what this one wrote


def words(stage: Stage, shared: dict[str, Any]) -> None:
    """Train a stage of the backbone, the heads or the decoder."""
    match stage:
        case Stage.VISION:
            VisionTrainer(VisionRun(**shared)).fit()
        case Stage.LANGUAGE:
            LanguageTrainer(LanguageRun(**shared)).fit()
        case Stage.POLISH:
            Polisher(PolishRun(**shared)).fit()
        case _:
            AnswersTrainer(AnswersRun(**shared)).fit()


def finish(trainer: LanguageTrainer, dense: DenseRun) -> None:
    """Write and calibrate the weights; boxes, masks and change too where they have been trained."""
    folder = dense.run / "weights"
    export(trainer, folder)
    typer.echo(calibrate(folder, dense.data, SETS, dense.limit).to_json())
    if (dense.run / "dense.pt").exists():
        typer.echo(DenseTrainer(dense).export(folder).to_json())


if __name__ == "__main__":
    typer.run(train)
