"""Stage `region`: `python -m model_server.training.region DATA_DIR --run RUN`, boxes as text by an expert of their own.

As in RSUniVLM's second stage: every decoder layer gets a second feed-forward expert, a copy of the one it has, and
only this is trained; attention, SFI, MDA, the question reader and the backbone stay as they are. The text is what the
papers write: `[VG]`, a phrase, then all boxes of it in reading order in hundredths of the image, or "none". Views are
squares of labelled images at many scales, turned, in other light, some of another sensor's look.

It starts from a finished checkpoint (`RUN/weights`, or the embedded one), saves `RUN/region.pt` and goes on from there
when the command is given again. The averaged expert that did best on views of the validation images is what counts;
the run ends early where none has been better for a while.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.checkpoints.store import WeightsError, load_checkpoint
from model_server.model.experts import GranularExperts
from model_server.model.rsvlm import RSVLM, Features
from model_server.perceiver import DEFAULT_WEIGHTS
from model_server.text.boxes import Box, BoxDialect, write_boxes
from model_server.text.concepts import CONCEPTS, DISTRACTORS, every_phrase
from model_server.training import processes
from model_server.training.concepts import DISTRACTOR_SETS, absent, boxed
from model_server.training.dense import trapezoid
from model_server.training.dense_data import BOX_SETS, THINGS, Scene, read_scenes
from model_server.training.dense_windows import Window, degraded, relit
from model_server.training.language import encode_questions
from model_server.training.packing import IGNORE, Packed, pack, packed_hidden
from model_server.training.place import Device, half, here, on
from model_server.training.texts import Text

REGION = "region"
SETS = {name: share for name, share in BOX_SETS.items() if name != "ucm"}  # which has no boxes
MAX_BOXES, BOX_TOKENS = 20, 18  # of a text, and of a box in it
NONE = "none"
ROWS = 10  # bands of the image that reading order goes by
LEAST, SEEN = 5, 0.4  # pixels of a box's longer side, and the share of its area, from which it is written


@dataclass(frozen=True, kw_only=True)
class RegionRun:
    data: Path
    run: Path
    weights: Path | None = None  # None: RUN/weights where it is, else the embedded ones
    steps: int = 3000
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 0.02
    fall: float = 0.5
    ema: float = 0.998
    seed: int = 0
    every: int = 250
    patience: int = 5  # validations without a better one, after which the run ends
    limit: int | None = None
    bf16: bool = True

    @property
    def start(self) -> Path:
        own = self.run / "weights"
        return self.weights or (own if own.is_dir() else DEFAULT_WEIGHTS)


def with_region_expert(model: RSVLM) -> RSVLM:
    """The model with one more expert in every layer, a copy of its first, which alone can be trained."""
    decoder = dataclasses.replace(model.config.decoder, experts=(*model.config.decoder.experts, REGION))
    grown = RSVLM(dataclasses.replace(model.config, decoder=decoder))
    grown.backbone.fold_norms()
    grown.load_state_dict(model.state_dict(), strict=False)
    grown.requires_grad_(False)
    for layer in grown.decoder.blocks:
        experts = layer.get_submodule("experts")
        if not isinstance(experts, GranularExperts):
            raise WeightsError("a region expert is added to whole experts; this model has low-rank ones")
        experts.experts[-1].load_state_dict(experts.experts[0].state_dict())
        experts.experts[-1].requires_grad_(True)
    return grown.eval()


def expert_state(model: RSVLM) -> dict[str, Tensor]:
    """The region expert's tensors."""
    return {name: p for name, p in model.state_dict().items() if name in _trained(model)}


def _trained(model: RSVLM) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def region_model(model: RSVLM, path: Path) -> RSVLM:
    """A checkpoint's model with the best expert of a `region.pt`. Raises WeightsError where they do not fit."""
    grown = with_region_expert(model)
    try:
        state = torch.load(path, map_location=here(), weights_only=True)["best"]
    except (OSError, KeyError) as error:
        raise WeightsError(f"{path} is not what stage `region` saves: {error}") from error
    shapes = {name: p.shape for name, p in _trained(grown).items()}
    if {name: p.shape for name, p in state.items()} != shapes:
        raise WeightsError(f"{path} was trained beside other weights than these")
    grown.load_state_dict(state, strict=False)
    return grown.requires_grad_(False)


# --- views and their texts -------------------------------------------------------------------------------------------


def reading_order(boxes: np.ndarray, side: int) -> np.ndarray:
    """Rows of [N, 4] from top to bottom in bands, in each from left to right."""
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.lexsort((middles[:, 0], (middles[:, 1] * ROWS / side).astype(int)))


def box_text(boxes: np.ndarray, side: int) -> str:
    """The answer: the first boxes in reading order, or that there are none."""
    rows = boxes[reading_order(boxes, side)][:MAX_BOXES].tolist()
    return write_boxes([Box(*row) for row in rows], BoxDialect.PERCENT, (side, side)) or NONE


@dataclass(frozen=True)
class View:
    """A square uint8 [3, S, S], what is asked about it, and the boxes [N, 4] of each phrase."""

    image: Tensor
    texts: list[Text]
    boxes: list[np.ndarray]


class RegionViews:
    """Draws views of labelled scenes."""

    def __init__(self, scenes: Sequence[Scene], side: int) -> None:
        self.side = side
        self.groups = {name: [s for s in scenes if s.record.set == name] for name in SETS}
        self.names = [name for name, group in self.groups.items() if group]
        weights = np.array([SETS[name].weight for name in self.names])
        self.weights = weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> View:
        """A view with one phrase of what is there, where something is, and one of what is not."""
        name = self.names[int(rng.choice(len(self.names), p=self.weights))]
        group, share = self.groups[name], SETS[name]
        scene = group[int(rng.integers(len(group)))]
        scale = float(np.exp(rng.uniform(np.log(share.low), np.log(share.high))))
        record, labels = scene.record, [o.label for o in scene.record.objects]
        focus = None
        if labels and rng.random() < 0.85:
            kind = sorted(set(labels))[int(rng.integers(len(set(labels))))]
            rows = [i for i, label in enumerate(labels) if label == kind]
            x1, y1, x2, y2 = scene.boxes[rows[int(rng.integers(len(rows)))]]
            focus = (float(x1 + x2) / 2, float(y1 + y2) / 2)
        height, width = scene.images[0].shape[:2]
        window = Window.draw(rng, height, width, self.side, scale, focus)
        image = degraded(relit(window.image(scene.images[0]), rng), rng, record.modality == "sar")
        whole = window.corners(scene.boxes)
        seen = whole.clip(0, self.side)
        area, area_seen = ((b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (whole, seen))
        there = (area_seen >= SEEN * area) & ((seen[:, 2:] - seen[:, :2]).max(1, initial=0) >= LEAST) & (area_seen > 0)
        whole_ones, any_part = (
            {label for label, shown in zip(labels, where, strict=True) if shown} for where in (there, area_seen > 0)
        )
        here = [n for n in sorted(boxed(record)) if CONCEPTS[n].labels & whole_ones]
        gone = [
            n for n in sorted((boxed(record) | absent(record)) & set(THINGS)) if not CONCEPTS[n].labels & any_part
        ]  # of what only a fragment is seen, nothing is asked
        if record.set in DISTRACTOR_SETS and rng.random() < 0.3:
            gone = list(DISTRACTORS)
        asked = [names[int(rng.integers(len(names)))] for names in (here, gone) if names]
        texts, boxes = [], []
        for name in asked:
            mine = np.array([name in CONCEPTS and label in CONCEPTS[name].labels for label in labels], bool)
            found = seen[mine & there] if len(labels) else seen
            texts.append(Text("[VG]", self._phrase(name, rng), box_text(found, self.side)))
            boxes.append(found)
        return View(image, texts, boxes)

    @staticmethod
    def _phrase(name: str, rng: np.random.Generator) -> str:
        said = CONCEPTS[name].said if name in CONCEPTS else (name,)
        return said[0] if rng.random() < 0.3 else said[int(rng.integers(len(said)))]


# --- training --------------------------------------------------------------------------------------------------------


class RegionTrainer:
    """The state of one run: model, moving average of its expert, optimiser and step."""

    def __init__(self, run: RegionRun) -> None:
        self.run = run
        torch.manual_seed(run.seed)
        loaded = load_checkpoint(run.start, str(here()))
        self.tokenizer, sentences = loaded.tokenizer, loaded.sentence_tokenizer
        self.model = with_region_expert(loaded.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.side = self.model.config.image_size
        self.expert = self.model.config.decoder.experts.index(REGION)
        dtype = torch.bfloat16 if run.bf16 else torch.float32
        self.encoder = copy.deepcopy(self.model.backbone).to(dtype).channels_last()
        self.questions = encode_questions(self.model.sentence, sentences, every_phrase())
        self.train, self.val = (
            RegionViews(read_scenes(run.data, SETS, split, run.limit), self.side) for split in ("train", "val")
        )  # fmt: skip
        self.parameters = list(_trained(self.model).values())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=run.rate, weight_decay=run.weight_decay, betas=(0.9, 0.98)
        )
        self.step, self.least, self.waited = 0, float("inf"), 0
        self.best: dict[str, Tensor] = {}
        self.checkpoint = run.run / "region.pt"
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=here(), weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.average.load_state_dict(state["average"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.least, self.waited = state["step"], state["least"], state["waited"]
        self.best = state["best"]
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        state = {"model": expert_state(self.model), "average": self._mean(), "best": self.best or self._mean(),
                 "optimiser": self.optimiser.state_dict(), "step": self.step, "least": self.least,
                 "waited": self.waited}  # fmt: skip
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _mean(self) -> dict[str, Tensor]:
        """The averaged expert's tensors."""
        names = _trained(self.model).keys()
        return {k: v.clone() for k, v in self.average.state_dict().items() if k in names}

    @torch.no_grad()
    def features(self, model: RSVLM, images: Tensor) -> Features:
        """Everything before the decoder is frozen."""
        maps, pooled = self.encoder(images.to(here()))
        return model.fuse({s: m.float() for s, m in maps.items()}, pooled.float())

    def loss(self, model: RSVLM, views: Sequence[View]) -> Tensor:
        """Nats a token of the answers, a text of many boxes counting as much as its boxes."""
        packed: Packed = pack([v.texts for v in views], self.tokenizer, self.questions, 1.0)
        with half(self.run.bf16):
            features = self.features(model, torch.stack([v.image for v in views]))
            hidden = packed_hidden(model, features, packed, torch.full((len(views),), self.expert))
            places = packed.target != IGNORE
            logits = model.decoder.logits(hidden[places]).float()
        return F.cross_entropy(logits, packed.target[places])

    def train_step(self) -> float:
        run = self.run
        rng = np.random.default_rng((run.seed, 23, self.step))
        factor = trapezoid(self.step, run.steps, min(100, run.steps // 10 + 1), run.fall)
        for group in self.optimiser.param_groups:
            group["lr"] = run.rate * factor
        loss = self.loss(self.model, [self.train.draw(rng) for _ in range(run.batch)])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        decay, means = min(run.ema, (1 + self.step) / (10 + self.step)), dict(self.average.named_parameters())
        with torch.no_grad():
            for name, now in _trained(self.model).items():
                means[name].lerp_(now, 1 - decay)
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, batches: int = 6) -> dict[str, float]:
        """Nats a token of the averaged expert on views of the validation images, the same each time."""
        losses = []
        for i in range(batches):
            rng = np.random.default_rng((977, i))
            losses.append(float(self.loss(self.average, [self.val.draw(rng) for _ in range(self.run.batch)])))
        return {"nats": round(sum(losses) / batches, 4)}

    def judge(self) -> dict[str, float]:
        """Validate, and keep the average where it is the best so far."""
        figures = self.validate()
        self.waited += 1
        if figures["nats"] < self.least:
            self.least, self.best, self.waited = figures["nats"], self._mean(), 0
        return figures

    def fit(self) -> None:
        run = self.run
        start, first, losses = time.monotonic(), self.step, list[float]()
        with (run.run / "region.jsonl").open("a", encoding="utf-8") as log:
            while self.step < run.steps and self.waited < run.patience:
                losses.append(self.train_step())
                done = self.step == run.steps
                if self.step % 20 == 0 or done:
                    pace = round((time.monotonic() - start) / (self.step - first), 3)
                    line = {"step": self.step, "seconds_a_step": pace, "loss": round(sum(losses) / len(losses), 4)}
                    print(json.dumps(line), file=log, flush=True)
                    losses.clear()
                if self.step % run.every == 0 or done:
                    line = json.dumps({"step": self.step, "val": self.judge()})
                    self.save()
                    print(line, file=log, flush=True)
                    print(line, flush=True)


def main(
    data: Annotated[Path, typer.Argument(help="folder of sets, each with a records.jsonl")],
    run: Annotated[Path, typer.Option(help="folder of this run, for checkpoint and log")] = Path("runs/nano"),
    weights: Annotated[Path | None, typer.Option(help="checkpoint to start from; default RUN/weights")] = None,
    steps: Annotated[int, typer.Option(min=1)] = RegionRun.steps,
    batch: Annotated[int, typer.Option(min=1, help="views a step")] = RegionRun.batch,
    seed: Annotated[int, typer.Option(help="of order and views")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="about this many images of each set and split")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice")] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU where there is one")] = Device.AUTO,
) -> None:
    """Train the region expert."""
    processes.refuse_several("model_server.training.region")
    if threads:
        torch.set_num_threads(threads)
    run.mkdir(parents=True, exist_ok=True)
    with on(device):
        RegionTrainer(
            RegionRun(data=data, run=run, weights=weights, steps=steps, batch=batch, seed=seed, limit=limit)
        ).fit()  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
