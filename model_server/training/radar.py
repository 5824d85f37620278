"""`python -m model_server.training.radar DATA_DIR --run RUN`: radar knowledge, then radar tasks, as FUSAR-GPT has them.

Stage `knowledge` trains low-rank adaptations of the decoder and the modulation by AlphaEarth embeddings: what covers a
point of `aef_points`, from a picture made of its backscatter (VV and VH in decibels as grey levels, with speckle) and
from its embedding, which stands in the middle of it. Stage `tasks` goes on with the adaptations and leaves the
modulation as it is (`lora.train_only`): ship types of `opensarship`, boxes and masks of `hrsid_sar` and
`oil_spill_sar`. None of these images has a known place, so that the modulation is an exact no-op in the second stage.

`--config debug` is the debug config with random weights, for a run of a minute: its base has learned nothing and stays
frozen, so its figures show that both stages train what they should, and no more. `nano` starts from a checkpoint. Each
stage saves `RUN/radar-STAGE.pt` and goes on from there when the command is given again; losses go to `RUN/radar.jsonl`.
The shipped weights have not been through these stages: their radar is learned by the dense branch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.checkpoints.store import Checkpoint, load_checkpoint
from model_server.evaluation.aef import CLASSES, Points, read_points
from model_server.model.config import ModulationConfig, debug
from model_server.model.rsvlm import RSVLM
from model_server.model.vision import square
from model_server.perceiver import DEFAULT_WEIGHTS
from model_server.text.names import readable
from model_server.text.tokenizer import TextTokenizer
from model_server.training import processes
from model_server.training.ablation import Reader, ask, logits_of
from model_server.training.ablation_data import Example, from_records
from model_server.training.images import thinned
from model_server.training.lora import add_lora, lora_state, train_only
from model_server.training.records import load_image, read_records
from model_server.training.start import sentence_parts
from model_server.training.targets import cosine_decay

Stage = Literal["knowledge", "tasks"]
STAGES: tuple[Stage, ...] = ("knowledge", "tasks")
POINTS, SHIPS, SEA = "aef_points", "opensarship", ("hrsid_sar", "oil_spill_sar")
RANK, ALPHA, DROPOUT = 8, 32.0, 0.05  # as published
COVER, SHIP = "what covers the ground?", "what type of ship is it?"
DARKEST, BRIGHTEST = -35.0, 5.0  # decibels that become 0 and 255
LOOKS = 4.0  # of the speckle


@dataclass(frozen=True, kw_only=True)
class RadarRun:
    data: Path
    run: Path
    config: str = "nano"
    steps: int = 300  # of each stage
    batch: int = 16
    rate: float = 2e-3
    seed: int = 0
    every: int = 100
    limit: int = 400  # examples of each set and split
    weights: Path = DEFAULT_WEIGHTS  # of nano


# --- examples --------------------------------------------------------------------------------------------------------


def point_examples(points: Points, side: int, seed: int, limit: int) -> list[Example]:
    """What covers each point: its backscatter as a speckled picture (VV, VH, VV), its embedding as one anchor."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(points.classes))[:limit]
    found = []
    for row in rows.tolist():
        vv, vh = points.backscatter[row].tolist()
        speckle = 10 * np.log10(rng.gamma(LOOKS, 1 / LOOKS, (2 * side, 2 * side, 3)))
        decibels = np.array([vv, vh, vv]) + speckle
        levels = 255 * (decibels - DARKEST) / (BRIGHTEST - DARKEST)
        pixels = levels.clip(0, 255).astype(np.uint8)
        anchors = points.embeddings[row][None], torch.full((1, 2), 0.5)
        answer = CLASSES[int(points.classes[row])]
        found.append(Example(square(pixels, side), square(pixels, 2 * side), "[VQA]", COVER, answer, anchors))
    return found


def knowledge(run: RadarRun, side: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: the last region is held out.

    Raises:
        FileNotFoundError: there are fewer than two regions.
    """
    regions = sorted((run.data / POINTS).glob("*.csv"))
    if len(regions) < 2:
        raise FileNotFoundError(f"{run.data / POINTS} holds {len(regions)} regions; it takes two, one to hold out")
    *train, held = (point_examples(read_points(path), side, run.seed, run.limit) for path in regions)
    return [example for part in train for example in part], held


def tasks(run: RadarRun, side: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of the radar sets. Raises DataError where a set is missing."""
    parts = []
    for split in ("train", "val"):
        found = from_records(read_records(run.data, SEA, split), side, run.seed)
        for record in thinned(read_records(run.data, [SHIPS], split), run.limit):
            if record.scene:
                pixels = load_image(record.images[0])
                views = square(pixels, side), square(pixels, 2 * side)
                found.append(Example(*views, "[VQA]", SHIP, readable(record.scene)))
        parts.append(found)
    return parts[0], parts[1]


# --- training --------------------------------------------------------------------------------------------------------


class RadarTrainer:
    """The model with its adaptations, through both stages."""

    def __init__(self, run: RadarRun) -> None:
        self.run = run
        torch.manual_seed(run.seed)
        loaded = None if run.config == "debug" else load_checkpoint(run.weights)
        side = (debug() if loaded is None else loaded.model.config).image_size
        self.data = {"knowledge": knowledge(run, side), "tasks": tasks(run, side)}
        self.model, self.reader = self._start(loaded)
        add_lora(self.model, RANK, ALPHA, DROPOUT)
        run.run.mkdir(parents=True, exist_ok=True)

    def _start(self, loaded: Checkpoint | None) -> tuple[RSVLM, Reader]:
        """A model with a modulation that changes nothing yet."""
        modulation = ModulationConfig(sigma=1.0, merge=1)
        if loaded is None:
            config = debug()
            answers = [example.answer for train, _ in self.data.values() for example in train]
            tokenizer = TextTokenizer.train(answers, config.decoder.vocab_size)
            decoder = dataclasses.replace(config.decoder, vocab_size=len(tokenizer))
            encoder, sentences = sentence_parts(config)
            model = RSVLM(dataclasses.replace(config, decoder=decoder, modulation=modulation, views=1))
            model.sentence.load_state_dict(encoder.state_dict())
            return model, Reader(tokenizer, sentences)
        model = RSVLM(dataclasses.replace(loaded.model.config, modulation=modulation, views=1))
        model.backbone.fold_norms()
        model.load_state_dict(loaded.model.state_dict(), strict=False)
        return model, Reader(loaded.tokenizer, loaded.sentence_tokenizer)

    def state(self) -> dict[str, Tensor]:
        """What both stages train: the adaptations and the modulation."""
        assert self.model.modulation is not None
        known = {f"modulation.{name}": p.detach() for name, p in self.model.modulation.state_dict().items()}
        return {**lora_state(self.model), **known}

    def fit(self) -> None:
        for stage in STAGES:
            self.train(stage)

    def train(self, stage: Stage) -> None:
        """Train one stage, from where an earlier call left it."""
        run, (train, held) = self.run, self.data[stage]
        names = set(train_only(self.model, stage))
        trained = [p for name, p in self.model.named_parameters() if name in names]
        optimiser = torch.optim.AdamW(trained, lr=run.rate)
        path, first = run.run / f"radar-{stage}.pt", 0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.model.load_state_dict(saved["state"], strict=False)
            optimiser.load_state_dict(saved["optimiser"])
            first = saved["step"]
        losses: list[float] = []
        with (run.run / "radar.jsonl").open("a", encoding="utf-8") as log:
            for step in range(first, run.steps):
                losses.append(self._step(stage, step, train, trained, optimiser))
                done = step + 1 == run.steps
                if (step + 1) % 20 == 0 or done:
                    _tell(log, stage=stage, step=step + 1, loss=round(sum(losses) / len(losses), 4))
                    losses.clear()
                if (step + 1) % run.every == 0 or done:
                    _tell(log, stage=stage, step=step + 1, val=self.measure(held))
                    saved = {"state": self.state(), "optimiser": optimiser.state_dict(), "step": step + 1}
                    torch.save(saved, path.with_suffix(".part"))
                    path.with_suffix(".part").replace(path)

    def _step(self, stage: Stage, step: int, train: Sequence[Example], trained: Sequence[nn.Parameter],
              optimiser: torch.optim.Optimizer) -> float:  # fmt: skip
        run = self.run
        seed = run.seed * 1_000_003 + STAGES.index(stage) * 500_009 + step  # a resumed run draws the same
        torch.manual_seed(seed)
        rows = np.random.default_rng(seed).integers(len(train), size=run.batch)
        for group in optimiser.param_groups:
            group["lr"] = run.rate * cosine_decay(step, run.steps, 10)
        self.model.train()
        self.model.backbone.eval()
        batch = self.reader.read(self.model, [train[i] for i in rows.tolist()])
        loss = F.cross_entropy(logits_of(self.model, batch).flatten(0, 1), batch.targets.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        return float(loss.detach())

    def measure(self, held: Sequence[Example]) -> dict[str, dict[str, float]]:
        """Nats a token and exact answers of held-out examples by task token; with anchors taken away, where some have
        any: what the modulation is worth."""
        nats, exact = ask(self.model.eval(), self.reader, held)
        figures = {"nats": _rounded(nats), "exact": _rounded(exact)}
        if any(example.anchors is not None for example in held):
            bare = [dataclasses.replace(example, anchors=None) for example in held]
            figures["nats without anchors"] = _rounded(ask(self.model, self.reader, bare)[0])
        return figures


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def _tell(log: TextIO, **line: object) -> None:
    print(json.dumps(line), file=log, flush=True)
    print(json.dumps(line), flush=True)


def main(
    data: Annotated[Path, typer.Argument(help=f"folder with {POINTS}, {SHIPS}, {', '.join(SEA)}")],
    run: Annotated[Path, typer.Option(help="folder of this run, for checkpoints and log")],
    config: Annotated[str, typer.Option(help="nano, from a checkpoint; or debug, for a run of a minute")] = "nano",
    weights: Annotated[Path, typer.Option(help="checkpoint that nano starts from")] = DEFAULT_WEIGHTS,
    steps: Annotated[int, typer.Option(min=1, help="of each stage")] = RadarRun.steps,
    batch: Annotated[int, typer.Option(min=1, help="examples a step")] = RadarRun.batch,
    rate: Annotated[float, typer.Option(help="learning rate at its highest")] = RadarRun.rate,
    seed: Annotated[int, typer.Option(help="of weights, order and speckle")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="examples of each set and split")] = RadarRun.limit,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
) -> None:
    """Train both stages."""
    processes.refuse_several("model_server.training.radar")
    if config not in ("nano", "debug"):
        raise typer.BadParameter(f"--config is nano or debug, not {config!r}")
    if threads:
        torch.set_num_threads(threads)
    RadarTrainer(
        RadarRun(
            data=data, run=run, config=config, weights=weights, steps=steps, batch=batch, rate=rate, seed=seed,
            limit=limit,
        )
    ).fit()  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
