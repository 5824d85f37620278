"""`python -m model_server.training.mechanisms DATA_DIR --run RUN --out docs`: how the image enters the decoder.

The survey's second experiment at the size that ships: cross-attention to all scales (SFI), its repetition in the
decoder (MDA) and recurrent injection, against plain concatenation of the last stage's tokens. Every variant starts
from the same stage `vision`, takes the same steps on the same images and texts in the same order, and is measured on
the same validation images; several seeds tell how much of a difference is chance. The frozen backbone's maps are made
once and kept in half the memory (bfloat16).

Figures go to `mechanisms.json`, variant by variant, and as a section into the folder's RESULTS.md; given again, the
command goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.evaluation.caption_metrics import tokenize
from model_server.evaluation.captioning import scores
from model_server.evaluation.page import put
from model_server.model.config import PRESETS, ModelConfig, StacksConfig
from model_server.model.greedy import follow
from model_server.model.rsvlm import RSVLM, Features, Questions
from model_server.model.vision import Backbone, square
from model_server.text.questions import QA, presence_questions, scene_question
from model_server.text.tokenizer import TextTokenizer
from model_server.training import processes
from model_server.training.language import FROZEN, encode_questions, trained_vision
from model_server.training.packing import IGNORE, EncodedQuestion, pack, packed_hidden
from model_server.training.place import Device, half, here, on
from model_server.training.records import Record, load_image, read_records, set_names
from model_server.training.start import sentence_parts
from model_server.training.targets import cosine_decay
from model_server.training.texts import ImageTexts, all_texts

SETS = ("ucm", "rsicd_aid")
JSON = "mechanisms.json"
CAPTION_TOKENS, ANSWER_TOKENS = 32, 8
BATCH = 64  # images measured or cached together


def _plain(c: ModelConfig) -> ModelConfig:
    fusion = dataclasses.replace(c.fusion, sfi=False, query_from_last=True, mda_layers=())
    return dataclasses.replace(c, fusion=fusion)


def _sfi(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, fusion=dataclasses.replace(c.fusion, mda_layers=()))


def _mda(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, fusion=dataclasses.replace(c.fusion, sfi=False))


def _injection(c: ModelConfig) -> ModelConfig:
    layers = c.fusion.mda_layers
    return dataclasses.replace(_plain(c), stacks=StacksConfig(factor=1), inject_layers=layers, inject_steps=True)


VARIANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "concatenation": _plain,
    "SFI": _sfi,
    "MDA": _mda,
    "injection": _injection,
    "SFI + MDA": lambda c: c,
}


@dataclass(frozen=True)
class Setting:
    """How each variant is trained; `limit` images of each set, evenly spread."""

    steps: int = 300
    batch: int = 24
    rate: float = 1e-3
    limit: int = 1500
    config: str = "nano"


@dataclass(frozen=True)
class Images:
    """Records with the frozen backbone's maps {stride: [N, C, H, W]} and pooled vectors [N, P], bfloat16."""

    records: list[Record]
    maps: dict[int, Tensor]
    pooled: Tensor

    def rows(self, index: Sequence[int] | np.ndarray) -> tuple[dict[int, Tensor], Tensor]:
        at = torch.as_tensor(np.asarray(index))
        return {s: m[at].float() for s, m in self.maps.items()}, self.pooled[at].float()


@dataclass(frozen=True)
class Outcome:
    """One variant trained once. `parameters` are those that trained; `figures` those of the validation images."""

    variant: str
    seed: int
    parameters: int
    seconds: float
    figures: Mapping[str, float]


@torch.no_grad()
def cached(backbone: Backbone, records: Sequence[Record], strides: Sequence[int], side: int, title: str) -> Images:
    """Every image once, upright, through the frozen backbone."""
    maps: dict[int, list[Tensor]] = {s: [] for s in strides}
    pooled = []
    for i in track(range(0, len(records), BATCH), description=title):
        x = torch.stack([square(load_image(r.images[0]), side) for r in records[i : i + BATCH]])
        found, vectors = backbone(x.to(here()))
        pooled.append(vectors.bfloat16())
        for s in strides:
            maps[s].append(found[s].bfloat16())
    return Images(list(records), {s: torch.cat(m) for s, m in maps.items()}, torch.cat(pooled))


class Bench:
    """What all variants share: images, texts, tokenizer, questions, the vision weights they start from."""

    def __init__(self, data: Path, run: Path, setting: Setting) -> None:
        self.setting = setting
        vision, vocabulary = trained_vision(run)
        self.vision = vision
        self.config = dataclasses.replace(
            PRESETS[setting.config](), labels=vocabulary.labels, objects=vocabulary.objects,
            concepts=len(vocabulary.concepts), dense=None,
        )  # fmt: skip
        sets = [name for name in SETS if name in set_names(data)]
        train, val = (
            [r for name in sets for r in _spread(read_records(data, [name], split), setting.limit)]
            for split in ("train", "val")
        )  # fmt: skip
        train, val = ([r for r in records if r.captions] for records in (train, val))
        self.texts: list[ImageTexts] = all_texts(train, 0)
        answers = [t.answer for group in self.texts for t in (*group.captions, *group.questions)]
        self.tokenizer = TextTokenizer.train(answers, self.config.decoder.vocab_size)
        self.sentence, self.sentence_tokenizer = sentence_parts(self.config)
        asked = [t.question for group in self.texts for t in group.questions]
        self.questions: Mapping[str, EncodedQuestion] = encode_questions(
            self.sentence, self.sentence_tokenizer, asked
        )  # fmt: skip
        backbone = Backbone(self.config.backbone)
        prefix = "backbone."
        backbone.load_state_dict({k.removeprefix(prefix): v for k, v in vision.items() if k.startswith(prefix)})
        backbone.eval().requires_grad_(False)
        backbone.fold_norms()
        backbone = backbone.bfloat16().channels_last()
        strides = sorted({*self.config.fusion.strides, max(backbone.widths)})
        side = self.config.image_size
        self.train = cached(backbone, train, strides, side, "maps, train")
        self.val = cached(backbone, val, strides, side, "maps, val")

    def model(self, variant: str, seed: int) -> RSVLM:
        """A variant on the trained vision part; only what lies between it and the words can be trained."""
        torch.manual_seed(seed)
        config = VARIANTS[variant](self.config)
        decoder = dataclasses.replace(config.decoder, vocab_size=len(self.tokenizer), dropout=0.0)
        model = RSVLM(dataclasses.replace(config, decoder=decoder))
        known = model.state_dict().keys()
        model.load_state_dict({k: v for k, v in self.vision.items() if k in known}, strict=False)
        model.sentence.load_state_dict(self.sentence.state_dict())
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(FROZEN))
        return model

    def features(self, model: RSVLM, images: Images, index: Sequence[int] | np.ndarray) -> Features:
        maps, pooled = images.rows(index)
        features = model.fuse(maps, pooled)
        if model.detail is not None:  # of the image as it is
            features.stacks = model.detail(maps)
        return features

    def outcome(self, variant: str, seed: int) -> Outcome:
        """Train and measure."""
        started, setting, model = time.monotonic(), self.setting, self.model(variant, seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=setting.rate, weight_decay=0.05, betas=(0.9, 0.98))
        order = np.random.default_rng(seed)
        model.train()
        model.backbone.eval()
        for step in track(range(setting.steps), description=f"{variant}, seed {seed}"):
            rows = order.choice(len(self.train.records), min(setting.batch, len(self.train.records)), replace=False)
            loss = self.loss(model, rows, Random(f"{seed}-{step}"))
            for group in optimiser.param_groups:
                group["lr"] = setting.rate * cosine_decay(step, setting.steps, min(40, setting.steps // 10 + 1))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        figures = self.measure(model.eval())
        size = sum(p.numel() for p in parameters)
        return Outcome(variant, seed, size, round(time.monotonic() - started, 1), figures)

    def loss(self, model: RSVLM, rows: np.ndarray, rng: Random) -> Tensor:
        packed = pack([self.texts[i].sample(rng) for i in rows], self.tokenizer, self.questions, 2.0)
        with half(True):
            features = self.features(model, self.train, rows)
            hidden = packed_hidden(model, features, packed, torch.zeros(len(rows), dtype=torch.long))
            places = packed.target != IGNORE
            logits = model.decoder.logits(hidden[places]).float()
        each = F.cross_entropy(logits, packed.target[places], reduction="none", label_smoothing=0.1)
        weight = packed.weight[places]
        return (each * weight).sum() / weight.sum()

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, model: RSVLM) -> dict[str, float]:
        """Captions (BLEU-1, CIDEr) of each set, scene and presence answered in words (accuracy)."""
        records = self.val.records
        said = self._said(model, [(i, "") for i in range(len(records))])
        out: dict[str, float] = {}
        for name in dict.fromkeys(record.set for record in records):
            own = [i for i, record in enumerate(records) if record.set == name]
            found = scores(
                [tokenize(said[i]) for i in own], [[tokenize(c) for c in records[i].captions] for i in own]
            )  # fmt: skip
            out |= {f"{name} BLEU-1": found["bleu1"], f"{name} CIDEr": found["cider"]}
        kinds: dict[str, list[tuple[int, QA]]] = {"scene": [], "presence": []}
        for i, record in enumerate(records):
            rng = Random(f"mechanisms-{record.id}")
            if record.scene:
                kinds["scene"].append((i, scene_question(record.scene, rng)))
            kinds["presence"] += [(i, qa) for qa in presence_questions(record, rng)]
        for kind, asked in kinds.items():
            if asked:
                answers = self._said(model, [(i, qa.question) for i, qa in asked])
                right = [a == qa.answer.lower() for a, (_, qa) in zip(answers, asked, strict=True)]
                out[kind] = float(np.mean(right))
        return {name: round(value, 4) for name, value in out.items()}

    @torch.no_grad()
    def _said(self, model: RSVLM, asked: Sequence[tuple[int, str]]) -> list[str]:
        """The greedy text for each (validation image, question); an empty question is a caption."""
        out: list[str] = []
        for start in range(0, len(asked), BATCH):
            rows, texts = zip(*asked[start : start + BATCH], strict=True)
            captions = not texts[0]
            token, steps = ("[CAP]", CAPTION_TOKENS) if captions else ("[VQA]", ANSWER_TOKENS)
            questions: Questions | None = None
            if not captions:
                encoded = self.sentence_tokenizer.encode_batch(list(texts))
                mask = torch.tensor([e.attention_mask for e in encoded]).bool()
                questions = model.read_questions(torch.tensor([e.ids for e in encoded]), mask)
            n = len(rows)
            logits, state = model.prefill(
                self.features(model, self.val, rows), torch.full((n,), self.tokenizer.tasks[token]), questions,
                torch.zeros(n, dtype=torch.long), steps,
            )  # fmt: skip
            ids, _ = follow(model.step, logits, state, steps, self.tokenizer.end)
            out += [self.tokenizer.decode(row) for row in ids.tolist()]
        return out


def _spread(records: Sequence[Record], limit: int) -> list[Record]:
    return [records[i * len(records) // limit] for i in range(limit)] if len(records) > limit else list(records)


# --- figures ---------------------------------------------------------------------------------------------------------


def section(folder: Path) -> list[str]:
    """Means over the seeds and how far they lie apart, where the experiment has been run into the folder."""
    if not (folder / JSON).is_file():
        return []
    stored = json.loads((folder / JSON).read_text(encoding="utf-8"))
    outcomes = [Outcome(**row) for row in stored["outcomes"]]
    setting, names = Setting(**stored["setting"]), list(outcomes[0].figures)
    seeds = len({outcome.seed for outcome in outcomes})
    several = f"mean of {seeds} seeds (largest difference between them)"
    spread = several if seeds > 1 else "one seed, so no spread is known"
    lines = [
        "",
        "## How the image enters the decoder",
        "",
        f"Each variant of `{setting.config}` from the same stage `vision`, {setting.steps} steps of {setting.batch} of "
        f"the same {stored['train']} images, greedy answers on {stored['val']} validation images: {spread}. "
        "A short training compares mechanisms, it does not say what the whole one reaches; scene and presence are "
        "answers in words, and in every variant the heads' findings enter as tokens "
        "(`python -m model_server.training.mechanisms DATA_DIR --run RUN --out docs`).",
        "",
        f"| variant | trained | {' | '.join(names)} |",
        f"| --- | --- | {' | '.join('---' for _ in names)} |",
    ]
    for variant in dict.fromkeys(outcome.variant for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.variant == variant]
        cells = []
        for name in names:
            values = [outcome.figures[name] for outcome in own]
            apart = f" ({max(values) - min(values):.3f})" if seeds > 1 else ""
            cells.append(f"{np.mean(values):.3f}{apart}")
        lines.append(f"| {variant} | {own[0].parameters / 1e6:.1f} M | {' | '.join(cells)} |")
    return lines


def measured(path: Path, setting: Setting) -> list[Outcome]:
    """What an earlier call with the same setting has left."""
    if not path.is_file():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [Outcome(**row) for row in stored["outcomes"]] if stored["setting"] == asdict(setting) else []


def main(
    data: Annotated[Path, typer.Argument(help=f"folder of sets, each with a records.jsonl: {', '.join(SETS)}")],
    run: Annotated[Path, typer.Option(help="folder of a run with vision.pt")],
    out: Annotated[Path, typer.Option(help=f"folder for {JSON}; its RESULTS.md is brought up to date")],
    steps: Annotated[int, typer.Option(min=1, help="of each variant")] = Setting.steps,
    batch: Annotated[int, typer.Option(min=1, help="images a step")] = Setting.batch,
    limit: Annotated[int, typer.Option(min=1, help="images of each set and split, evenly spread")] = Setting.limit,
    seeds: Annotated[int, typer.Option(min=1, help="how often each variant is trained")] = 2,
    config: Annotated[str, typer.Option(help="nano, or debug for a run of seconds")] = Setting.config,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU where there is one")] = Device.AUTO,
) -> None:
    """Train and measure every variant with every seed."""
    processes.refuse_several("model_server.training.mechanisms")
    if threads:
        torch.set_num_threads(threads)
    setting = Setting(steps=steps, batch=batch, limit=limit, config=config)
    out.mkdir(parents=True, exist_ok=True)
    outcomes = measured(out / JSON, setting)
    done = {(outcome.variant, outcome.seed) for outcome in outcomes}
    grid = [(variant, seed) for seed in range(seeds) for variant in VARIANTS if (variant, seed) not in done]
    if not grid:
        typer.echo("everything has been measured already")
        return
    with on(device):
        bench = Bench(data, run, setting)
        for variant, seed in grid:
            outcome = bench.outcome(variant, seed)
            outcomes.append(outcome)
            typer.echo(json.dumps(asdict(outcome)))
            rows = {"setting": asdict(setting), "train": len(bench.train.records), "val": len(bench.val.records),
                    "outcomes": [asdict(o) for o in outcomes]}  # fmt: skip
            (out / JSON).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    put(out, section(out))


if __name__ == "__main__":
    typer.run(main)
