"""Ablation grid: the whole architecture at debug size, and without each of its mechanisms, trained alike.

    python -m model_server.training.ablation DATA --out ablation.json     record sets, see records.py
    python -m model_server.training.ablation --out ablation.json          scenes made here

Every variant starts from the same seed, sees the same examples in the same order, and is asked the same held-out ones.
The figures are those of a network of under a hundred thousand parameters after minutes: they show that a mechanism is
there and learns, and which way it pulls on these data; they say nothing about a large one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import EXPERTS, ModelConfig, ModulationConfig, StacksConfig, debug
from model_server.model.experts import route
from model_server.model.modulation import Anchors
from model_server.model.rsvlm import RSVLM, Questions, prompt_mask
from model_server.text.tokenizer import TextTokenizer
from model_server.training.ablation_data import Example, from_records, made
from model_server.training.images import thinned
from model_server.training.records import read_records, set_names
from model_server.training.start import sentence_parts
from model_server.training.targets import cosine_decay

ALL = "all mechanisms"


def whole() -> ModelConfig:
    """The debug config with every mechanism of the five papers."""
    config = debug()
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, experts=EXPERTS),
        stacks=StacksConfig(factor=2, strides=(8, 16)),
        inject_layers=(1,),
        inject_steps=True,
        modulation=ModulationConfig(sigma=1.0, merge=1),
        views=1,
    )


def _no_sfi(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, fusion=dataclasses.replace(c.fusion, sfi=False))


def _no_mda(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, fusion=dataclasses.replace(c.fusion, mda_layers=()))


def _no_injection(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, stacks=None, inject_layers=(), inject_steps=False)


def _one_expert(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, experts=EXPERTS[:1]))


def _no_tlm(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, modulation=None)


def _no_detail(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, stacks=None if c.stacks is None else dataclasses.replace(c.stacks, factor=1))


WITHOUT: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "SFI": _no_sfi,
    "MDA": _no_mda,
    "injection": _no_injection,
    "experts": _one_expert,
    "TLM": _no_tlm,
    "detail view": _no_detail,
}


def variants() -> dict[str, ModelConfig]:
    """All mechanisms, each one missing, and none."""
    found = {ALL: whole(), **{f"without {name}": change(whole()) for name, change in WITHOUT.items()}}
    none = whole()
    for change in WITHOUT.values():
        none = change(none)
    return {**found, "none of them": none}


@dataclass(frozen=True)
class Setting:
    """How each variant is trained."""

    steps: int = 150
    batch: int = 16
    rate: float = 3e-3


@dataclass(frozen=True)
class Batch:
    """Examples as tensors. `ids` are the task token and the answer; `targets` what comes next, -100 where nothing."""

    images: Tensor
    canvas: Tensor
    anchors: Anchors
    questions: Questions
    ids: Tensor  # int [B, T]
    targets: Tensor  # int [B, T]
    expert: Tensor  # int [B], CPU


class Reader:
    """Turns examples into batches of a model."""

    def __init__(self, tokenizer: TextTokenizer, sentences: Tokenizer) -> None:
        self.tokenizer, self.sentences = tokenizer, sentences

    def read(self, model: RSVLM, examples: Sequence[Example]) -> Batch:
        encoded = self.sentences.encode_batch([e.question for e in examples])
        mask = torch.tensor([e.attention_mask for e in encoded]).bool()
        mask &= torch.tensor([bool(e.question) for e in examples])[:, None]
        with torch.no_grad():
            questions = model.read_questions(torch.tensor([e.ids for e in encoded]), mask)
        rows = [[self.tokenizer.tasks[e.task], *self.tokenizer.encode(e.answer), self.tokenizer.end] for e in examples]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r[:-1]) for r in rows], True, self.tokenizer.pad)
        targets = nn.utils.rnn.pad_sequence([torch.tensor(r[1:]) for r in rows], True, -100)
        experts = model.config.decoder.experts
        expert = [route(e.task, experts) if len(experts) > 1 else 0 for e in examples]
        return Batch(
            torch.stack([e.image for e in examples]), torch.stack([e.canvas for e in examples]),
            Anchors.of([e.anchors for e in examples], 64), questions, ids, targets, torch.tensor(expert),
        )  # fmt: skip


def logits_of(model: RSVLM, batch: Batch) -> Tensor:
    """Logits [B, T, vocabulary] of what follows each of the batch's tokens."""
    features = model.encode(batch.images, canvas=batch.canvas, anchors=batch.anchors)
    x, visible, positions = model.prompt(features, batch.ids[:, 0], batch.questions)
    rest, n = batch.ids[:, 1:], batch.ids.shape[1]
    x = torch.cat((x, model.decoder.embed(rest)), 1)
    visible = torch.cat((visible, torch.ones_like(rest, dtype=torch.bool)), 1)
    positions = torch.cat((positions, positions[:, -1:] + 1 + torch.arange(n - 1)), 1)
    mask = prompt_mask(visible, model.visual_tokens)
    hidden = model.decoder(x, positions, mask, batch.expert, features.windows, details=model.details(features))
    return model.decoder.logits(hidden[:, -n:])


@dataclass(frozen=True)
class Outcome:
    """One variant trained once. By task token: nats a token of the held-out answers, and answers without a fault."""

    variant: str
    seed: int
    parameters: int
    seconds: float
    nats: dict[str, float]
    exact: dict[str, float]

    @property
    def mean_nats(self) -> float:
        return sum(self.nats.values()) / len(self.nats)


def train(name: str, config: ModelConfig, reader: Reader, data: tuple[Sequence[Example], Sequence[Example]],
          setting: Setting, seed: int) -> Outcome:  # fmt: skip
    """Train a variant on data[0] and ask it data[1]."""
    started = time.monotonic()
    torch.manual_seed(seed)
    decoder = dataclasses.replace(config.decoder, vocab_size=len(reader.tokenizer))
    model = RSVLM(dataclasses.replace(config, decoder=decoder))
    model.sentence.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setting.rate)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(setting.steps):
        rows = torch.randint(len(data[0]), (setting.batch,), generator=order).tolist()
        batch = reader.read(model, [data[0][i] for i in rows])
        loss = F.cross_entropy(logits_of(model, batch).flatten(0, 1), batch.targets.flatten())
        for group in optimiser.param_groups:
            group["lr"] = setting.rate * cosine_decay(step, setting.steps, 10)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    nats, exact = ask(model.eval(), reader, data[1])
    size = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("sentence."))
    return Outcome(name, seed, size, time.monotonic() - started, nats, exact)


@torch.no_grad()
def ask(model: RSVLM, reader: Reader, examples: Sequence[Example]) -> tuple[dict[str, float], dict[str, float]]:
    """Nats a token and the share of answers all of whose tokens are the likeliest ones, by task token."""
    nats: dict[str, float] = {}
    exact: dict[str, float] = {}
    for task in sorted({e.task for e in examples}):
        own = [e for e in examples if e.task == task]
        lost, tokens, right = 0.0, 0, 0
        for i in range(0, len(own), 64):
            batch = reader.read(model, own[i : i + 64])
            logits, wanted = logits_of(model, batch), batch.targets != -100
            lost += float(F.cross_entropy(logits[wanted], batch.targets[wanted], reduction="sum"))
            tokens += int(wanted.sum())
            right += int(((logits.argmax(-1) == batch.targets) | ~wanted).all(1).sum())
        nats[task], exact[task] = lost / tokens, right / len(own)
    return nats, exact


def table_of(outcomes: Sequence[Outcome], anchored: bool) -> Table:
    """Means over the seeds; beside the mean loss how far the seeds lie apart."""
    tasks = sorted(outcomes[0].nats)
    table = Table(title=f"ablation, {len({o.seed for o in outcomes})} seeds: nats a token, exact answers")
    table.add_column("variant")
    for column in ("parameters", "mean nats", "spread", *tasks):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(o.variant for o in outcomes):
        own = [o for o in outcomes if o.variant == name]
        means = [o.mean_nats for o in own]
        n = len(own)
        cells = [f"{sum(o.nats[t] for o in own) / n:.3f} {sum(o.exact[t] for o in own) / n:4.0%}" for t in tasks]
        spread = f"{max(means) - min(means):.3f}"
        table.add_row(name, f"{own[0].parameters:,}", f"{sum(means) / len(means):.3f}", spread, *cells)
    if not anchored:
        table.caption = "No image of these data has anchors: TLM is an exact no-op, its row differs by the start alone."
    return table


def read(data: Path | None, side: int, limit: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: of all record sets of a directory, or made here."""
    if data is None:
        return made(limit, side, seed), made(max(limit // 4, 1), side, seed + 1)
    parts = []
    for split in ("train", "val"):
        records = [r for name in set_names(data) for r in thinned(read_records(data, [name], split), limit)]
        parts.append(from_records([r for r in records if len(r.images) == 1], side, seed))
    return parts[0], parts[1]


app = typer.Typer(add_completion=False)


@app.command()
def run(
    data: Annotated[Path | None, typer.Argument(help="directory of record sets; without it, scenes made here")] = None,
    out: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("ablation.json"),
    steps: Annotated[int, typer.Option(min=1, help="of each variant")] = Setting.steps,
    seeds: Annotated[int, typer.Option(min=1, help="how often each variant is trained")] = 2,
    limit: Annotated[int, typer.Option(min=1, help="images of each set and split, evenly spread")] = 200,
) -> None:
    """Train the whole architecture at debug size, and without each mechanism; print and write what was measured."""
    config = whole()
    examples = read(data, config.image_size, limit, seed=0)
    if not all(examples):
        raise typer.BadParameter(f"{data} gives {len(examples[0])} training and {len(examples[1])} held-out examples")
    tokenizer = TextTokenizer.train([e.answer for e in examples[0]], config.decoder.vocab_size)
    reader = Reader(tokenizer, sentence_parts(config)[1])
    grid = [(name, c, seed) for seed in range(seeds) for name, c in variants().items()]
    outcomes = [
        train(name, c, reader, examples, Setting(steps=steps), seed)
        for name, c, seed in track(grid, description=f"{len(examples[0])} examples")
    ]
    anchored = any(e.anchors is not None for e in examples[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    source = {"made": data is None, "train": len(examples[0]), "held_out": len(examples[1]), "anchors": anchored}
    figures = {"data": source, "steps": steps, "outcomes": [dataclasses.asdict(o) for o in outcomes]}
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    Console().print(table_of(outcomes, anchored))


if __name__ == "__main__":
    app()
