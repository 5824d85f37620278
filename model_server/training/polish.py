"""Stage `polish`: self-critical training of captions (Rennie et al. 2017) on CIDEr and BLEU-1.

A few captions of each image are sampled; each is rewarded by its measure above the mean of the others (a leave-one-out
baseline). The measure is mostly against the captions of the nearest training images, weighted by likeness, and a
little against the image's own, which the model knows by heart: what the neighbours agree on is what a stranger would
say as well. CIDEr-D alone makes captions ever shorter; BLEU-1 and its brevity penalty hold their length.
Cross-entropy on captions and answers goes on beside it, so that questions are not forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from model_server.evaluation.caption_metrics import Cider, Tokens, bleu, tokenize
from model_server.model.generate import sample
from model_server.model.rsvlm import Features
from model_server.model.vision import square
from model_server.training import processes
from model_server.training.language import LanguageRun, LanguageTrainer
from model_server.training.packing import IGNORE, pack, packed_hidden
from model_server.training.place import half, here
from model_server.training.texts import Text

NEIGHBOURS, TEMPERATURE = 8, 0.07
MAX_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class PolishRun(LanguageRun):
    steps: int = 300
    batch: int = 48
    rate: float = 2e-4
    every: int = 100
    ema: float = 0.98
    samples: int = 5
    neighbour_share: float = 0.85
    bleu_weight: float = 2.0
    text_weight: float = 1.0


class Polisher(LanguageTrainer):
    """Goes on from the averaged model of stage `language`."""

    stage = "polish"
    repeat: ClassVar[dict[str, int]] = {"ucm": 4, "rsvqa_lr": 40, "rsvqa_hr": 40}

    def __init__(self, run: PolishRun) -> None:
        self.polish = run
        super().__init__(run)
        self.captions = {i: [tokenize(c) for c in r.captions] for i, r in enumerate(self.train) if r.captions}
        sets = {self.train[i].set for i in self.captions}
        self.scorers = {
            name: Cider([texts for i, texts in self.captions.items() if self.train[i].set == name]) for name in sets
        }
        self.near: dict[int, list[tuple[int, float]]] = {}
        if self.step == 0:
            state = torch.load(run.run / "language.pt", map_location=here(), weights_only=True)
            for model in (self.model, self.average):
                model.load_state_dict(state["average"], strict=False)

    @torch.no_grad()
    def prepare(self, images: list[np.ndarray]) -> None:
        """Find the nearest training images of the same set for each captioned one, itself left out."""
        heads, parts, captioned = self.model.heads, [], list(self.captions)
        for i in track(range(0, len(captioned), 64), description="neighbours"):
            x = torch.stack([square(images[j], self.config.image_size) for j in captioned[i : i + 64]])
            pooled = self.maps(x)[1]
            words = F.normalize(heads.concepts(pooled).sigmoid().sqrt(), dim=-1)
            parts.append(torch.cat((heads.image_vectors(pooled), words), -1) / math.sqrt(2))
        features = torch.cat(parts)  # [captioned, D]
        for name in self.scorers:
            rows = torch.tensor([k for k, i in enumerate(captioned) if self.train[i].set == name])
            table = features[rows] @ features[rows].T
            table.fill_diagonal_(-torch.inf)
            values, places = table.topk(min(NEIGHBOURS, len(rows) - 1), -1)
            weights = (values / TEMPERATURE).softmax(-1)
            for row, others, shares in zip(rows.tolist(), rows[places].tolist(), weights.tolist(), strict=True):
                self.near[captioned[row]] = [(captioned[o], w) for o, w in zip(others, shares, strict=True)]

    def rewards(self, image: int, said: list[Tokens]) -> np.ndarray:
        """CIDEr-D and weighted BLEU-1 of each caption, own references and neighbours' mixed: float [samples]."""
        scorer, share = self.scorers[self.train[image].set], self.polish.neighbour_share
        shares = [(image, 1 - share), *((other, share * w) for other, w in self.near[image])]
        texts = [text for i, _ in shares for text in self.captions[i]]
        weights = [w / len(self.captions[i]) for i, w in shares for _ in self.captions[i]]
        worded = [sum(w * bleu([tokens], [self.captions[i]])[0] for i, w in shares) for tokens in said]
        return scorer.similarity(said, texts) @ np.array(weights) + self.polish.bleu_weight * np.array(worded)

    @torch.no_grad()
    def draw(self, features: Features) -> list[list[str]]:
        """Sampled captions of each image, `samples` of them."""
        k, n = self.polish.samples, len(features.visual)
        if not n:
            return []
        generator = torch.Generator(here()).manual_seed(processes.own_seed(self.run.seed * 1_000_003 + self.step))
        tasks = torch.full((n * k,), self.tokenizer.tasks["[CAP]"])
        rows, expert = torch.arange(n).repeat_interleave(k), torch.zeros(n * k, dtype=torch.long)
        logits, state = self.model.prefill(features.rows(rows), tasks, None, expert, MAX_TOKENS)
        ids = sample(
            self.model, logits, state, steps=MAX_TOKENS, end=self.tokenizer.end, banned=self.unsayable,
            generator=generator,
        ).tolist()  # fmt: skip
        return [[self.tokenizer.decode(ids[i * k + s]) for s in range(k)] for i in range(n)]

    def step_loss(self, rows: np.ndarray, images: Tensor) -> Tensor:
        run, rng = self.polish, Random(f"polish-{self.run.seed}-{self.step}")
        plain = [self.texts[i].sample(rng) for i in rows]
        mine = processes.share(len(rows))
        rows, plain = rows[mine], plain[mine]
        maps, pooled = self.maps(images)
        captioned = [b for b, i in enumerate(rows) if int(i) in self.captions]
        self.model.eval()  # sample from the policy itself, without dropout
        with torch.no_grad(), half(run.bf16):
            said = self.draw(self.model.fuse(maps, pooled).rows(torch.tensor(captioned, dtype=torch.long)))
        self.model.train()
        drawn: list[list[Text]] = [[] for _ in rows]
        advantage: list[list[float]] = [[] for _ in rows]
        for b, captions in zip(captioned, said, strict=True):
            reward = self.rewards(int(rows[b]), [tokenize(c) for c in captions])
            drawn[b] = [Text("[CAP]", "", c) for c in captions]
            advantage[b] = ((reward - reward.mean()) * len(reward) / (len(reward) - 1)).tolist()
        texts = [[*a, *b] for a, b in zip(drawn, plain, strict=True)]
        packed = pack(texts, self.tokenizer, self.questions, run.answer_weight)
        with half(run.bf16):
            hidden = packed_hidden(
                self.model, self.model.fuse(maps, pooled), packed, torch.zeros(len(rows), dtype=torch.long)
            )
            places = packed.target != IGNORE
            logits = self.model.decoder.logits(hidden[places]).float()
        gain = torch.zeros_like(packed.weight)  # advantage of each token of a drawn caption
        is_drawn = torch.zeros_like(places)
        for b, values in enumerate(advantage):
            for s, value in enumerate(values):
                mine = packed.segment[b] == s
                gain[b][mine], is_drawn[b][mine] = value, True
        target, drawn_places = packed.target[places], is_drawn[places]
        nll = F.cross_entropy(logits, target, reduction="none")
        critical = (nll * gain[places])[drawn_places].sum() / processes.mean(drawn_places.sum()).clamp(min=1)
        weight = packed.weight[places] * ~drawn_places
        smooth = F.cross_entropy(logits, target, reduction="none", label_smoothing=run.smoothing)
        return critical + run.text_weight * (smooth * weight).sum() / processes.mean(weight.sum()).clamp(min=1)
