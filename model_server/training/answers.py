"""Stage `answers`: questions alone, while captions are held where self-critical training left them.

Goes on from stage `polish`. Cross-entropy on answers, among them comparisons that follow from counts (counted.py) and
more wordings of every question; beside it, on captions, the divergence from what the polished model says next
(KL, as in distillation, Hinton et al. 2015), so that learning to answer does not undo how it describes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.rsvlm import RSVLM, Features
from model_server.text.questions import QA, presence_questions, rephrase, scene_question
from model_server.training import processes
from model_server.training.counted import compared
from model_server.training.language import LanguageRun, LanguageTrainer, stored_questions
from model_server.training.packing import IGNORE, Packed, pack, packed_hidden
from model_server.training.place import half, here
from model_server.training.records import Record
from model_server.training.texts import ImageTexts, Text, scene_presence

COMPARED = 240  # comparisons made from the counts of one image
WORDINGS = 4
CAPTION = "[CAP]"


@dataclass(frozen=True, kw_only=True)
class AnswersRun(LanguageRun):
    steps: int = 500
    batch: int = 48
    rate: float = 4e-4
    smoothing: float = 0.05
    every: int = 100
    ema: float = 0.99
    hold: float = 2.0  # weight of the divergence on captions


def asked_of(record: Record, known: ImageTexts, rng: Random, scenes: Sequence[str]) -> ImageTexts:
    """The captions of an image, to be held, and its questions in more wordings than stage `language` used."""
    questions = [qa for _ in range(WORDINGS) for qa in presence_questions(record, rng)]
    for qa in record.qa:
        questions += [qa, *(QA(rephrase(qa.question, rng), qa.answer, qa.type) for _ in range(WORDINGS - 1))]
    if record.scene:
        questions += [scene_question(record.scene, rng), *scene_presence(record, rng, scenes)]
    questions += compared(record.qa, rng, COMPARED)
    texts = tuple(Text("[VQA]", qa.question, qa.answer) for qa in questions)
    take = 2 if known.captions and not record.presence else 8
    return ImageTexts(known.captions, texts, 2, take)


class AnswersTrainer(LanguageTrainer):
    """Goes on from the averaged model of stage `polish`, which also is what captions are held to."""

    stage = "answers"
    repeat: ClassVar[dict[str, int]] = {"ucm": 4, "rsvqa_lr": 120, "rsvqa_hr": 120}

    def __init__(self, run: AnswersRun) -> None:
        self.answers = run
        super().__init__(run)
        polished = torch.load(run.run / "polish.pt", map_location=here(), weights_only=True)["average"]
        self.held = copy.deepcopy(self.average)
        self.held.load_state_dict(polished, strict=False)
        if self.step == 0:
            for model in (self.model, self.average):
                model.load_state_dict(polished, strict=False)
        scenes = sorted({r.scene for r in self.train if r.scene})
        self.texts = [
            asked_of(record, known, Random(f"answers-{run.seed}-{record.id}"), scenes)
            for record, known in zip(self.train, self.texts, strict=True)
        ]
        asked = [t.question for group in self.texts for t in group.questions]
        self.questions = stored_questions(
            run.run / "asked.pt", self.average.sentence, self.sentence_tokenizer, asked
        )  # fmt: skip

    def step_loss(self, rows: np.ndarray, images: Tensor) -> Tensor:
        run, rng = self.answers, Random(f"answers-{self.run.seed}-{self.step}")
        texts = [self.texts[i].sample(rng) for i in rows][processes.share(len(rows))]
        said = [[t for t in group if t.task == CAPTION] for group in texts]
        packed = pack(texts, self.tokenizer, self.questions, run.answer_weight)
        captions = pack(said, self.tokenizer, self.questions, run.answer_weight)
        maps, pooled = self.maps(images)
        with half(run.bf16):
            with torch.no_grad():
                wanted = _logits(self.held, self.held.fuse(maps, pooled), captions).log_softmax(-1)
            logits = _logits(self.model, self.model.fuse(maps, pooled), packed)
        is_caption = _of_captions(packed, [len(group) for group in said])[packed.target != IGNORE]
        answers = F.cross_entropy(
            logits[~is_caption], packed.target[packed.target != IGNORE][~is_caption], label_smoothing=run.smoothing
        )  # fmt: skip
        kept = F.kl_div(logits[is_caption].log_softmax(-1), wanted, reduction="sum", log_target=True)
        tokens = torch.stack(((~is_caption).sum(), is_caption.sum()))
        each = processes.mean(tokens)
        return answers * (tokens[0] / each[0]) + run.hold * (kept / each[1].clamp(min=1))


def _logits(model: RSVLM, features: Features, packed: Packed) -> Tensor:
    """Next-token logits [places, vocabulary] of the places that have a target, image after image."""
    hidden = packed_hidden(model, features, packed, torch.zeros(len(packed.ids), dtype=torch.long))
    return model.decoder.logits(hidden[packed.target != IGNORE]).float()


def _of_captions(packed: Packed, captions: Sequence[int]) -> Tensor:
    """bool [B, L]: places of the first texts of each image, as many as it has captions."""
    return (packed.segment >= 0) & (packed.segment < torch.tensor(captions)[:, None])
