"""Stage `vision`: the backbone and the image heads, from ImageNet weights, on scenes, objects and captions.

The stem and the first blocks stay frozen (bf16, folded batch norm). Loss: scene cross-entropy within the set and
over all sets, presence BCE, caption-word BCE, and a contrastive loss between image and caption whose targets are
softened by how alike the captions are.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import PRESETS, ModelConfig
from model_server.model.heads import ImageHeads
from model_server.model.vision import Backbone, square
from model_server.training import processes
from model_server.training.images import batches, epoch_order, load_images, thinned
from model_server.training.place import here, tensor
from model_server.training.records import read_records
from model_server.training.sentences import SentenceBank
from model_server.training.start import start_backbone
from model_server.training.targets import ImageTargets, Vocabulary, cosine_decay

SETS = ("rsicd_aid", "ucm")
FROZEN_SHARE = 1 / 3  # of the blocks: 7 of Lite2's 21
REPEAT = {"ucm": 2}  # the small set is seen twice an epoch


@dataclass(frozen=True, kw_only=True)
class VisionRun:
    data: Path
    run: Path
    config: str = "nano"
    steps: int = 1700
    batch: int = 48
    rate: float = 4e-4
    head_rate: float = 2e-3
    weight_decay: float = 0.02
    ema: float = 0.9985
    seed: int = 0
    every: int = 300
    limit: int | None = None


class VisionNet(nn.Module):
    """The trainable part: late blocks and heads, on the output of the frozen early blocks."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone)
        self.heads = ImageHeads(
            config.backbone.head, config.sentence.width, config.embed_width,
            len(vocabulary.labels), len(vocabulary.objects), len(vocabulary.concepts),
        )  # fmt: skip

        self.frozen = round(FROZEN_SHARE * len(config.backbone.blocks))

    def pooled(self, early: Tensor) -> Tensor:
        return self.backbone.late(early, self.frozen)[1]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        frozen = ("backbone.stem.", *(f"backbone.blocks.{i}." for i in range(self.frozen)))
        return [(n, p) for n, p in self.named_parameters() if not n.startswith(frozen)]


def losses(net: VisionNet, pooled: Tensor, rows: np.ndarray, t: ImageTargets, bank: SentenceBank, captions: Tensor,
           keep: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """The weighted terms for a batch: pooled [B, P]; captions [B, S], one sentence vector an image."""
    heads = net.heads
    dropped = F.dropout(pooled, 0.2)
    known = torch.arange(len(bank.label_vectors))
    logits = heads.label_logits(dropped, bank.label_vectors, known, keep)  # [B, labels]
    scene = tensor(t.scene[rows])
    closed = tensor(t.closed[t.group[rows]])
    within = F.cross_entropy(logits.masked_fill(~closed, -1e4), scene, label_smoothing=0.0)
    wrong = tensor(t.open[t.scene[rows]])
    wrong[torch.arange(len(rows)), scene] = True  # the true label stays in the denominator
    across = F.cross_entropy(logits.masked_fill(~wrong, -1e4), scene)
    presence = tensor(t.presence[rows])
    asked = presence >= 0
    objects = F.binary_cross_entropy_with_logits(heads.objects(dropped), presence.clamp(min=0), reduction="none")
    has = tensor(t.has_captions[rows])
    concepts = F.binary_cross_entropy_with_logits(
        heads.concepts(dropped), tensor(t.concepts[rows]), reduction="none"
    ).sum(1)
    vectors = tensor(t.tfidf[rows])[has]
    soft = torch.softmax(vectors @ vectors.T / 0.1, dim=1)
    pair = heads.similarity(pooled[has], captions[has])
    contrast = -(soft * pair.log_softmax(1)).sum(1).mean() - (soft.T * pair.log_softmax(0)).sum(0).mean()
    return {
        "scene": within,
        "open": 0.3 * across,
        "objects": (objects * asked).sum() / asked.sum().clamp(min=1),
        "concepts": 0.06 * concepts[has].mean(),
        "contrast": 0.15 * contrast,
    }


class VisionTrainer:
    """Holds the state of one run: network, its moving average, optimiser and step."""

    def __init__(self, run: VisionRun) -> None:
        self.run = run
        torch.manual_seed(run.seed)
        train = read_records(run.data, SETS, "train")
        val = read_records(run.data, SETS, "val")
        self.vocabulary = Vocabulary.build(train)
        train, val = thinned(train, run.limit), thinned(val, run.limit)
        self.config = PRESETS[run.config]()
        self.train, self.val = train, val
        self.targets = ImageTargets.build(train, self.vocabulary)
        self.val_targets = ImageTargets.build(val, self.vocabulary)
        self.bank = SentenceBank.build(self.config, train, self.vocabulary)
        self.net = VisionNet(self.config, self.vocabulary)
        self.net.backbone.channels_last()
        start_backbone(self.net.backbone, self.config)
        self.average = copy.deepcopy(self.net).eval()
        early = copy.deepcopy(self.net.backbone).eval()
        early.fold_norms()
        self.early = early.bfloat16().channels_last()
        processes.share_norms(self.net)
        named = self.net.trainable()
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if n.startswith("backbone.")], "base": run.rate},
                {"params": [p for n, p in named if not n.startswith("backbone.")], "base": run.head_rate},
            ],
            lr=run.rate, weight_decay=run.weight_decay,
        )  # fmt: skip
        self.step = 0
        self.checkpoint = run.run / "vision.pt"
        run.run.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=here(), weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "vocabulary": {k: list(v) for k, v in vars(self.vocabulary).items()},
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    @torch.no_grad()
    def encode_early(self, images: Tensor) -> Tensor:
        x = self.early.normalise(images.to(here())).bfloat16().contiguous(memory_format=torch.channels_last)
        return self.early.early(x, self.net.frozen).float()

    def train_step(self, rows: np.ndarray, images: Tensor) -> dict[str, float]:
        run = self.run
        rng = np.random.default_rng((run.seed, 7, self.step))
        factor = cosine_decay(self.step, run.steps, 60)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        self.net.train()
        pooled = processes.whole(self.net.pooled(self.encode_early(images)))  # the losses compare images of a batch
        captions = self.bank.sample(rows, rng)
        keep = tensor(rng.random(len(self.vocabulary.labels)) > 0.25)
        terms = losses(self.net, pooled, rows, self.targets, self.bank, captions, keep)
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        trainable = [p for _, p in self.net.trainable()]
        processes.average_gradients(trainable)
        nn.utils.clip_grad_norm_(trainable, 5.0)
        self.optimiser.step()
        self.step += 1
        decay = min(run.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for (_, mean), (_, now) in zip(self.average.trainable(), self.net.trainable(), strict=True):
                mean.lerp_(now, 1 - decay)
            for mean, now in zip(self.average.buffers(), self.net.buffers(), strict=True):
                mean.copy_(now)
        return {k: float(v.detach()) for k, v in terms.items()}

    @torch.no_grad()
    def validate(self, images: list[np.ndarray]) -> dict[str, float]:
        """Scene accuracy per set (all labels learned, and by words alone) and presence of the averaged network."""
        net, t = self.average.eval(), self.val_targets
        pooled = []
        for i in range(0, len(images), 64):
            x = torch.stack([square(image, self.config.image_size) for image in images[i : i + 64]])
            pooled.append(net.pooled(self.encode_early(x)))
        p = torch.cat(pooled)
        known = torch.arange(len(self.vocabulary.labels))
        figures: dict[str, float] = {}
        for name, rows in (("", known), ("_words", torch.full_like(known, -1))):
            logits = net.heads.label_logits(p, self.bank.label_vectors, rows)
            logits = logits.masked_fill(~tensor(t.closed[t.group]), -1e4)
            right = (logits.argmax(1) == tensor(t.scene)).float().cpu().numpy()
            for g, set_name in enumerate(sorted({r.set for r in self.val})):
                figures[f"{set_name}{name}"] = float(right[t.group == g].mean())
        truth = t.presence
        yes = net.heads.objects(p).cpu().numpy() > 0
        asked = truth >= 0
        figures["presence"] = float((yes == (truth == 1))[asked].mean())
        recall = [float((yes == want)[truth == want].mean()) for want in (0, 1)]
        figures["presence_balanced"] = sum(recall) / 2
        return figures

    def fit(self) -> None:
        run = self.run
        images = load_images(self.train, "train images")
        val_images = load_images(self.val, "val images")
        order = epoch_order(self.train, REPEAT, run.steps, run.batch, run.seed)
        log = processes.log(run.run / "vision.jsonl")
        start, first, sums = time.monotonic(), self.step, dict[str, float]()
        for step, rows, x in batches(images, order, self.config.image_size, run.seed, self.step):
            for k, v in self.train_step(rows, x).items():
                sums[k] = sums.get(k, 0.0) + v
            if (step + 1) % 20 == 0:
                rate = (step + 1 - first) * run.batch / (time.monotonic() - start)
                line = {"step": step + 1, "images_s": round(rate, 1), **{k: round(v / 20, 4) for k, v in sums.items()}}
                print(json.dumps(line), file=log, flush=True)
                sums.clear()
            if processes.is_main() and ((step + 1) % run.every == 0 or step + 1 == run.steps):
                self.save()
                line = {"step": step + 1, "val": {k: round(v, 4) for k, v in self.validate(val_images).items()}}
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
        log.close()
