"""Stage `language`: SFI, the question reader and the decoder, on captions and questions, over the frozen backbone.

Images are encoded afresh at each step (bf16), so every step sees new views. Several texts of an image share its
visual prefix (see packing.py). Loss: next-token cross-entropy with label smoothing; answers weigh more than captions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import PRESETS
from model_server.model.generate import beam_search
from model_server.model.rsvlm import RSVLM, Features
from model_server.model.sentence import SentenceEncoder
from model_server.model.vision import square
from model_server.text.tokenizer import TextTokenizer
from model_server.training import processes
from model_server.training.images import batches, epoch_order, load_images, thinned
from model_server.training.packing import IGNORE, EncodedQuestion, Packed, pack, packed_hidden
from model_server.training.place import half, here
from model_server.training.records import read_records
from model_server.training.start import sentence_parts
from model_server.training.targets import Vocabulary, cosine_decay
from model_server.training.texts import ImageTexts, Text, all_texts

SETS = ("rsicd_aid", "rsvqa_hr", "rsvqa_lr", "ucm")
FROZEN = ("backbone.", "sentence.", "heads.")


@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    data: Path
    run: Path
    config: str = "nano"
    steps: int = 1500
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    answer_weight: float = 2.0
    dropout: float = 0.1
    ema: float = 0.998
    seed: int = 0
    every: int = 250
    limit: int | None = None
    bf16: bool = True


def trained_vision(run: Path) -> tuple[dict[str, Tensor], Vocabulary]:
    """The averaged network and the vocabulary of stage `vision`."""
    state = torch.load(run / "vision.pt", map_location=here(), weights_only=True)
    return state["average"], Vocabulary(**{k: tuple(v) for k, v in state["vocabulary"].items()})


@torch.no_grad()
def encode_questions(encoder: SentenceEncoder, tokenizer: Tokenizer, questions: list[str],
                     batch: int = 256) -> dict[str, EncodedQuestion]:  # fmt: skip
    """Every distinct question through the frozen sentence encoder once, in half precision."""
    order = sorted(set(questions), key=lambda q: (len(q), q))
    out = {}
    starts = range(0, len(order), batch)
    for i in track(starts, description=f"{len(order)} questions"):
        texts = order[i : i + batch]
        encoded = tokenizer.encode_batch(texts)
        mask = torch.tensor([e.attention_mask for e in encoded]).bool()
        states, vectors = encoder(torch.tensor([e.ids for e in encoded]), mask)
        for row, text in enumerate(texts):
            out[text] = EncodedQuestion(states[row, mask[row]].half(), vectors[row].half())
    return out


def stored_questions(
    path: Path, encoder: SentenceEncoder, tokenizer: Tokenizer, questions: list[str]
) -> dict[str, EncodedQuestion]:
    """As `encode_questions`, kept in a file for the next stage or a resumed one, which ask the same."""
    with processes.main_first():
        if path.exists():
            kept: dict[str, tuple[Tensor, Tensor]] = torch.load(path, map_location=here(), weights_only=True)
            if kept.keys() >= set(questions):
                return {q: EncodedQuestion(*parts) for q, parts in kept.items()}
        encoded = encode_questions(encoder, tokenizer, questions)
        torch.save({q: (e.states.clone(), e.vector.clone()) for q, e in encoded.items()}, path)
        return encoded


class LanguageTrainer:
    """The state of one run: model, moving average, optimiser and step."""

    stage = "language"
    repeat: ClassVar[dict[str, int]] = {"ucm": 2, "rsvqa_lr": 8, "rsvqa_hr": 8}  # times an epoch

    def __init__(self, run: LanguageRun) -> None:
        self.run = run
        torch.manual_seed(run.seed)
        self.train, self.val = (
            thinned(read_records(run.data, SETS, split), run.limit) for split in ("train", "val")
        )  # fmt: skip
        self.texts: list[ImageTexts] = all_texts(self.train, run.seed)
        answers = [t.answer for group in self.texts for t in (*group.captions, *group.questions)]
        vision, vocabulary = trained_vision(run.run)
        config = dataclasses.replace(
            PRESETS[run.config](), labels=vocabulary.labels, objects=vocabulary.objects,
            concepts=len(vocabulary.concepts),
        )  # fmt: skip
        self.tokenizer = TextTokenizer.train(answers, config.decoder.vocab_size)
        decoder = dataclasses.replace(config.decoder, dropout=run.dropout, vocab_size=len(self.tokenizer))
        self.config = dataclasses.replace(config, decoder=decoder)
        encoder, self.sentence_tokenizer = sentence_parts(self.config)
        asked = [t.question for group in self.texts for t in group.questions]
        self.questions = stored_questions(run.run / "questions.pt", encoder, self.sentence_tokenizer, asked)
        self.model = RSVLM(self.config)
        self.model.load_state_dict(vision, strict=False)
        self.model.sentence.load_state_dict(encoder.state_dict())
        self.model.backbone.eval()
        self.model.backbone.fold_norms()
        for name, p in self.model.named_parameters():
            p.requires_grad_(not name.startswith(FROZEN))
        self.encoder = copy.deepcopy(self.model.backbone).bfloat16().channels_last()
        self.average = copy.deepcopy(self.model).eval()
        decay = [p for n, p in self._trainable() if p.ndim >= 2 and "embed" not in n]
        plain = [p for n, p in self._trainable() if not (p.ndim >= 2 and "embed" not in n)]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": run.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=run.rate, betas=(0.9, 0.98),
        )  # fmt: skip
        self.step = 0
        self.checkpoint = run.run / f"{self.stage}.pt"
        self.unsayable = torch.zeros(self.config.decoder.vocab_size, dtype=torch.bool)
        self.unsayable[[self.tokenizer.pad, *self.tokenizer.tasks.values()]] = True
        if self.checkpoint.exists():
            self.resume()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=here(), weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.average.load_state_dict(state["average"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        def own(model: RSVLM) -> dict[str, Tensor]:
            return {k: v for k, v in model.state_dict().items() if not k.startswith(FROZEN)}

        state = {"model": own(self.model), "average": own(self.average), "optimiser": self.optimiser.state_dict(),
                 "step": self.step}  # fmt: skip
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    @torch.no_grad()
    def maps(self, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Frozen backbone, bf16: uint8 [B, 3, S, S] -> float32 maps and pooled vectors."""
        maps, pooled = self.encoder(images.to(here()))
        return {s: m.float() for s, m in maps.items()}, pooled.float()

    def loss(self, features: Features, packed: Packed) -> Tensor:
        expert = torch.zeros(len(packed.ids), dtype=torch.long)
        hidden = packed_hidden(self.model, features, packed, expert)
        places = packed.target != IGNORE
        logits = self.model.decoder.logits(hidden[places]).float()
        each = F.cross_entropy(
            logits, packed.target[places], reduction="none", label_smoothing=self.run.smoothing
        )  # [places]
        weight = packed.weight[places]
        return (each * weight).sum() / processes.mean(weight.sum())

    def step_loss(self, rows: np.ndarray, images: Tensor) -> Tensor:
        """Loss of one batch: the rows of its records, and uint8 images [B, 3, S, S] of this process's share."""
        run, rng = self.run, Random(f"{self.run.seed}-{self.step}")
        texts = [self.texts[i].sample(rng) for i in rows][processes.share(len(rows))]
        packed = pack(texts, self.tokenizer, self.questions, run.answer_weight)
        maps, pooled = self.maps(images)
        with half(run.bf16):
            return self.loss(self.model.fuse(maps, pooled), packed)

    def train_step(self, rows: np.ndarray, images: Tensor) -> float:
        run = self.run
        factor = cosine_decay(self.step, run.steps, min(60, run.steps // 10 + 1))
        for group in self.optimiser.param_groups:
            group["lr"] = run.rate * factor
        self.model.train()
        loss = self.step_loss(rows, images)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        trainable = [p for _, p in self._trainable()]
        processes.average_gradients(trainable)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        self.optimiser.step()
        self.step += 1
        self.average_weights()
        return float(processes.mean(loss.detach()))

    @torch.no_grad()
    def average_weights(self) -> None:
        decay = min(self.run.ema, (1 + self.step) / (10 + self.step))
        means = dict(self.average.named_parameters())
        for name, now in self._trainable():
            means[name].lerp_(now, 1 - decay)

    @torch.no_grad()
    def validate(self, images: list[np.ndarray]) -> dict[str, float]:
        """Exact answers per question type and set, greedily, from the averaged model."""
        right: dict[str, list[bool]] = {}
        for image, record in zip(images, self.val, strict=True):
            asked = [Text("[VQA]", qa.question, qa.answer) for qa in record.qa][:12]
            if not asked:
                continue
            features = self.average.fuse(*self.maps(square(image, self.config.image_size)[None]))
            encoded = self.sentence_tokenizer.encode_batch([t.question for t in asked])
            mask = torch.tensor([e.attention_mask for e in encoded]).bool()
            questions = self.average.read_questions(torch.tensor([e.ids for e in encoded]), mask)
            n = len(asked)
            logits, state = self.average.prefill(
                features.rows(torch.zeros(n, dtype=torch.long)), torch.full((n,), self.tokenizer.tasks["[VQA]"]),
                questions, torch.zeros(n, dtype=torch.long), 12,
            )  # fmt: skip
            said = beam_search(
                self.average, logits, state, beams=1, steps=12, end=self.tokenizer.end, banned=self.unsayable
            )  # list of n lists
            for qa, text, best in zip(record.qa, asked, said, strict=False):
                hit = self.tokenizer.decode(best[0].ids) == text.answer.lower()
                right.setdefault(f"{record.set}/{qa.type}", []).append(hit)
        return {k: sum(v) / len(v) for k, v in sorted(right.items())}

    def prepare(self, images: list[np.ndarray]) -> None:
        """A stage's own preparation on the decoded training images; none here."""

    def fit(self) -> None:
        run = self.run
        images, val_images = load_images(self.train, "train images"), load_images(self.val, "val images")
        self.prepare(images)
        order = epoch_order(self.train, self.repeat, run.steps, run.batch, run.seed)
        processes.draw_apart()  # dropout
        start, first, losses = time.monotonic(), self.step, list[float]()
        with processes.log(run.run / f"{self.stage}.jsonl") as log:
            for step, rows, x in batches(images, order, self.config.image_size, run.seed + 1, self.step):
                losses.append(self.train_step(rows, x))
                if (step + 1) % 20 == 0:
                    rate = (step + 1 - first) * run.batch / (time.monotonic() - start)
                    line = {"step": step + 1, "images_s": round(rate, 1), "loss": round(sum(losses) / len(losses), 4)}
                    print(json.dumps(line), file=log, flush=True)
                    losses.clear()
                if processes.is_main() and ((step + 1) % run.every == 0 or step + 1 == run.steps):
                    self.save()
                    figures = {k: round(v, 4) for k, v in self.validate(val_images).items()}
                    print(json.dumps({"step": step + 1, "val": figures}), file=log, flush=True)
                    print(json.dumps({"step": step + 1, "val": figures}), flush=True)
