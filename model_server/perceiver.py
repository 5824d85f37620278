"""The resident model as one object: a mixed batch of tile questions in, calibrated answers out.

Knows pixels and text, nothing of rasters, HTTP or queues.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.checkpoints.store import WeightsError, load_checkpoint
from model_server.dense_perceiver import DensePerceiver
from model_server.model.attention import Backend
from model_server.model.experts import ROUTES, route
from model_server.model.generate import Hypothesis, beam_search
from model_server.model.rsvlm import Features
from model_server.model.vision import square
from model_server.protocol import (
    ModelInfo,
    PerceiveRequest,
    RankedAnswer,
    Task,
    TaskNotServed,
    TileAnswer,
    TileCaption,
    TileClasses,
    TileVqa,
)
from model_server.query import Query
from model_server.text.agreement import most_agreed
from model_server.text.answers import answer_kind
from model_server.text.names import readable

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "nano"
TASK_TOKEN: dict[Task, str] = {
    "caption": "[CAP]", "vqa": "[VQA]", "classify": "[CLS]",
    "ground": "[VG]", "segment": "[SEG]", "detect_change": "[CCD]",
}  # fmt: skip
WORDS: tuple[Task, ...] = ("caption", "vqa", "classify")  # answered from the pooled image and the decoder
DENSE: dict[Task, str] = {"ground": "region", "segment": "pixel", "detect_change": "pixel"}  # and its granularity
CAPTION_BEAMS, CAPTION_TOKENS, CAPTION_LENGTH_POWER = 3, 40, 0.3
ANSWER_BEAMS, ANSWER_TOKENS = 5, 16
SURE = 0.8  # what a full description names

__all__ = ["DEFAULT_WEIGHTS", "Perceiver", "Query", "WeightsError"]


class Perceiver:
    """One loaded checkpoint. Not thread-safe: the engine is its only caller."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        loaded = load_checkpoint(weights, device)
        self.model, self.config = loaded.model, loaded.model.config
        self.tokenizer, self.sentence_tokenizer = loaded.tokenizer, loaded.sentence_tokenizer
        self.calibration = loaded.calibration
        self.device = torch.device(device)
        self.dense: DensePerceiver | None = None
        if loaded.dense is not None:
            self.dense = DensePerceiver(
                self.model.backbone, loaded.dense, loaded.dense_calibration, self._phrase_vectors, self.device
            )
        self.tasks: tuple[Task, ...] = (*WORDS, *DENSE) if self.dense else WORDS
        self.info = ModelInfo(
            model=self.config.name,
            weights_digest=loaded.digest,
            attention_backend=Backend.SDPA,
            precision="float32",
            device=device,
        )
        merged = dict(self.config.merged_labels)
        self.taxonomy = tuple(name for name in self.config.labels if name not in merged)
        self._banned = torch.zeros(self.config.decoder.vocab_size, dtype=torch.bool, device=self.device)
        self._banned[[self.tokenizer.pad, *self.tokenizer.tasks.values()]] = True

    @classmethod
    def load(cls, weights: Path = DEFAULT_WEIGHTS, device: str = "cpu") -> Perceiver:
        """Raises WeightsError where the folder is not a checkpoint."""
        return cls(Path(weights), device)

    def warm_up(self) -> None:
        """Answer one query of each task, so that the first caller does not pay for lazy initialisation."""
        blank = np.full((self.config.image_size, self.config.image_size, 3), 127, np.uint8)
        self.answer([Query("caption", blank), Query("vqa", blank, text="Is there water?"), Query("classify", blank)])
        if self.dense is not None:
            self.answer(
                [
                    Query("ground", blank, text="ship"),
                    Query("segment", blank, labels=("water",)),
                    Query("detect_change", blank, after=blank),
                ]
            )

    def route(self, task: Task) -> tuple[str, str]:
        """Task token and expert that serve a task."""
        return TASK_TOKEN[task], DENSE.get(task) or ROUTES[TASK_TOKEN[task]]

    def warnings(self, request: PerceiveRequest) -> list[str]:
        """What of a request does not bear on its answer."""
        if request.task == "detect_change" and request.text.strip():
            return ["This model tells changed from unchanged ground, not one kind of change from another."]
        return []

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        """Answer a mixed batch, in order. Images are encoded together, then each kind of answer in one pass.

        Queries that hold the same array encode it once, apart for words and for boxes, masks and change.

        Raises:
            TaskNotServed: a query wants boxes, masks or change of a checkpoint without a dense branch.
        """
        answers: dict[int, TileAnswer] = {}
        dense = [i for i, q in enumerate(queries) if q.task in DENSE]
        if dense:
            if self.dense is None:
                raise TaskNotServed(queries[dense[0]].task, self.info.model, self.tasks)
            answers.update(zip(dense, self.dense.answer([queries[i] for i in dense]), strict=True))
        words = [i for i, q in enumerate(queries) if q.task not in DENSE]
        answers.update(zip(words, self._say([queries[i] for i in words]), strict=True))
        return [answers[i] for i in range(len(queries))]

    def _say(self, queries: Sequence[Query]) -> list[TileCaption | TileVqa | TileClasses]:
        if not queries:
            return []
        images = {id(q.image): q.image for q in queries}
        place = {key: row for row, key in enumerate(images)}
        # A caption is the same whichever way the image is turned, so it is read off all views; the places in an answer
        # are not.
        turned = any(q.task == "caption" for q in queries)
        features = self.model.encode(self._pixels(list(images.values())), turned)
        answers: list[TileCaption | TileVqa | TileClasses | None] = [None] * len(queries)
        for task, serve in (("caption", self._captions), ("vqa", self._answers), ("classify", self._classes)):
            rows = [i for i, q in enumerate(queries) if q.task == task]
            if rows:
                at = torch.tensor([place[id(queries[i].image)] for i in rows], device=self.device)
                views = self.config.views if task == "caption" else 1
                group = features.rows(torch.cat([at + v * len(images) for v in range(views)]))
                for i, answer in zip(rows, serve(group, [queries[i] for i in rows]), strict=True):
                    answers[i] = answer
        return [a for a in answers if a is not None]

    @torch.inference_mode()
    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, D] unit rows in which images described alike lie close: image vector and caption words."""
        pooled = self.model.encode(self._pixels(images)).pooled
        heads = self.model.heads
        words = F.normalize(heads.concepts(pooled).sigmoid().sqrt(), dim=-1)
        return (torch.cat((heads.image_vectors(pooled), words), -1) / math.sqrt(2)).cpu().numpy()

    @torch.inference_mode()
    def image_vectors(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, E] unit rows of the contrastive head; their products with `text_vectors` rank captions."""
        return self.model.heads.image_vectors(self.model.encode(self._pixels(images)).pooled).cpu().numpy()

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E] unit rows of the contrastive head."""
        ids, mask = self._sentence_ids(texts)
        return self.model.heads.sentence_vectors(self.model.sentence(ids, mask)[1]).cpu().numpy()

    def prompt_tokens(self, request: PerceiveRequest, images: int) -> int:
        """Length of the sequences that the decoder reads before it answers: of each image its visual tokens (of a
        caption, those of all turned views), of a question its vector and its tokens, and the task token. Classes,
        boxes, masks and change are read off vectors and maps: there it is the tokens of the phrases."""
        tokens = sum(len(self.sentence_tokenizer.encode(text).ids) for text in (request.text, *request.labels) if text)
        if request.task not in ("caption", "vqa"):
            return tokens
        views = self.config.views if request.task == "caption" else 1
        question = 1 + tokens if request.task == "vqa" else 0
        return images * (views * (self.model.visual_tokens + 1) + question)

    def answer_tokens(self, text: str) -> int:
        """Tokens of a text in the decoder's vocabulary."""
        return len(self.tokenizer.encode(text))

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([square(image, self.config.image_size) for image in images]).to(self.device)

    def _decode(self, features: Features, task: Task, questions: Sequence[str], beams: int, steps: int,
                length_power: float, views: int = 1) -> list[list[Hypothesis]]:  # fmt: skip
        n = len(features.visual)
        token, expert = TASK_TOKEN[task], route(TASK_TOKEN[task], self.config.decoder.experts)
        read = None
        if questions:
            ids, mask = self._sentence_ids(questions)
            read = self.model.read_questions(ids, mask)
        tasks = torch.full((n,), self.tokenizer.tasks[token], device=self.device)
        logits, state = self.model.prefill(features, tasks, read, torch.full((n,), expert), steps, views)
        return beam_search(
            self.model, logits, state, beams=beams, steps=steps, end=self.tokenizer.end, banned=self._banned,
            length_power=length_power,
        )  # fmt: skip

    def _captions(self, features: Features, queries: Sequence[Query]) -> list[TileCaption]:
        found = self._decode(
            features, "caption", (), CAPTION_BEAMS, CAPTION_TOKENS, CAPTION_LENGTH_POWER, self.config.views
        )
        out = []
        for i, (query, hypotheses) in enumerate(zip(queries, found, strict=True)):
            said = [self.tokenizer.decode(h.ids) for h in hypotheses]
            best = most_agreed(said, [h.logprob for h in hypotheses])
            text = sentence(said[best])
            if query.detail == "full":
                text = " ".join([text, *self._findings(features.pooled[i : i + 1])])
            out.append(TileCaption(caption=text, confidence=self.calibration.caption(hypotheses[best].score(1.0))))
        return out

    def _findings(self, pooled: Tensor) -> list[str]:
        """Sentences on the scene and the objects that the heads are sure of."""
        scores = self._label_scores(pooled, self.taxonomy)[0]
        best = max(range(len(scores)), key=scores.__getitem__)
        seen = self.model.heads.objects(pooled).sigmoid()[0].tolist()
        objects = [name for name, p in zip(self.config.objects, seen, strict=True) if p >= SURE]
        out = [f"The scene looks like {self.taxonomy[best]}."] if scores[best] >= SURE else []
        return [*out, f"Visible: {', '.join(objects)}."] if objects else out

    def _answers(self, features: Features, queries: Sequence[Query]) -> list[TileVqa]:
        found = self._decode(features, "vqa", [q.text for q in queries], ANSWER_BEAMS, ANSWER_TOKENS, 0.0)
        return [self._vqa(hypotheses) for hypotheses in found]

    def _vqa(self, hypotheses: Sequence[Hypothesis]) -> TileVqa:
        said = list({self.tokenizer.decode(h.ids): h.logprob for h in reversed(hypotheses)}.items())[::-1]
        answer, logprob = said[0]
        kind = answer_kind(answer)
        if kind == "yes_no":
            return self._yes_or_no(dict(said))
        confidence = self.calibration.answer_confidence(logprob)
        rest = sum(math.exp(p) for _, p in said[1:])
        return TileVqa(
            answer=answer,
            kind=kind,
            confidence=confidence,
            abstained=confidence < self.calibration.abstain_below(yes_no=False),
            alternatives=[
                RankedAnswer(answer=a, confidence=(1 - confidence) * math.exp(p) / max(rest, 1e-9))
                for a, p in said[1:4]
            ],
        )

    def _yes_or_no(self, said: Mapping[str, float]) -> TileVqa:
        """The calibrated odds of yes against no, whatever else might have been said."""
        least = min(said.values())  # of an answer that is not among the best, no more is known than that it is rarer
        yes = self.calibration.yes_no(said.get("yes", least) - said.get("no", least))
        answer, other = ("yes", "no") if yes >= 0.5 else ("no", "yes")
        confidence = max(yes, 1 - yes)
        return TileVqa(
            answer=answer,
            kind="yes_no",
            confidence=confidence,
            abstained=confidence < self.calibration.abstain_below(yes_no=True),
            alternatives=[RankedAnswer(answer=other, confidence=1 - confidence)],
        )

    def _classes(self, features: Features, queries: Sequence[Query]) -> list[TileClasses]:
        out = []
        for i, query in enumerate(queries):
            labels = query.labels or self.taxonomy
            scores = self._label_scores(features.pooled[i : i + 1], labels, merge=not query.labels)[0]
            out.append(TileClasses(labels=list(labels), scores=scores))
        return out

    def _label_scores(self, pooled: Tensor, labels: Sequence[str], merge: bool = True) -> list[list[float]]:
        """Probabilities [B, N] over a list of labels; `merge` adds what near-synonyms of the taxonomy got."""
        merged = dict(self.config.merged_labels) if merge else {}
        names = [*labels, *merged]
        ids, mask = self._sentence_ids(names)
        row = {name: i for i, name in enumerate(self.config.labels)}
        known = torch.tensor([row.get(readable(name), -1) for name in names], device=self.device)
        logits = self.model.heads.label_logits(pooled, self.model.sentence(ids, mask)[1], known)
        probabilities = (logits / self.calibration.label_temperature).softmax(-1)
        out = probabilities[:, : len(labels)].clone()
        for i, name in enumerate(merged, start=len(labels)):
            out[:, list(labels).index(merged[name])] += probabilities[:, i]
        return out.tolist()

    def _phrase_vectors(self, phrases: Sequence[str]) -> Tensor:
        """Unit sentence vectors [N, S]."""
        return self.model.sentence(*self._sentence_ids(phrases))[1]

    def _sentence_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.sentence_tokenizer.encode_batch([readable(t) for t in texts])
        ids = torch.tensor([e.ids for e in encoded], device=self.device)
        return ids, torch.tensor([e.attention_mask for e in encoded], device=self.device).bool()


def sentence(text: str) -> str:
    """Capital and full stop."""
    text = re.sub(r"\s+", " ", text).strip()
    return text[:1].upper() + text[1:] + "." if text else text
