"""The resident model as one object: a mixed batch of tile questions in, calibrated answers out.

Knows pixels and text, nothing of rasters, HTTP or queues.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.batching.feature_cache import ByteCache
from model_server.batching.memory_plan import MemoryPlan, free_memory
from model_server.checkpoints.store import WeightsError, load_checkpoint
from model_server.dense.perceiver import DensePerceiver
from model_server.model.attention import Backend
from model_server.model.dense import DenseBranch
from model_server.model.experts import ROUTES, route
from model_server.model.generate import Hypothesis
from model_server.model.half import halve, halve_dense
from model_server.model.int8 import quantise
from model_server.model.packed import can_pack, pack_decoder, pack_projections
from model_server.model.packed_fusion import pack_fusion
from model_server.model.packed_vision import pack_backbone, pack_dense
from model_server.model.seen import Seen, prefixes, see
from model_server.model.slots import Lane, Prefix, prefill
from model_server.model.transfer import sent
from model_server.model.vision import square
from model_server.precision import Precision, computed_in, serving_dtype
from model_server.protocol import (
    UNUSED_ANCHORS,
    ModelInfo,
    PerceiveRequest,
    Priority,
    Task,
    TaskNotServed,
    TileAnswer,
    TileCaption,
)
from model_server.query import Query
from model_server.scene_labels import SceneLabels
from model_server.sentences import Sentences
from model_server.text.agreement import most_agreed
from model_server.text.comparison import Comparison, read_comparison
from model_server.text.sides import names_a_side
from model_server.wording import comparison_answer, sentence, vqa_answer

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "nano"
TASK_TOKEN: dict[Task, str] = {
    "caption": "[CAP]", "vqa": "[VQA]", "classify": "[CLS]",
    "ground": "[VG]", "segment": "[SEG]", "detect_change": "[CCD]",
}  # fmt: skip
WORDS: tuple[Task, ...] = ("caption", "vqa", "classify")  # answered from the pooled image and the decoder
DENSE: dict[Task, str] = {"ground": "region", "segment": "pixel", "detect_change": "pixel"}  # and its granularity
CAPTION_BEAMS, CAPTION_TOKENS, CAPTION_LENGTH_POWER = 3, 40, 0.3
ANSWER_BEAMS, ANSWER_TOKENS = 5, 16
TRAINED_GSD_M = (0.15, 10.0)  # metres per pixel of the training images, from the finest set to the coarsest
ENCODED = 4  # images at a time: with sixteen, all of whose views leave the processor's caches, it takes longer
PLACES: dict[Priority, int] = {"interactive": 8, "bulk": 2}  # new tiles of a pass
TOGETHER = 16  # images that `answer` takes in at a time
PARTS: dict[Task, int] = {"caption": 1, "vqa": 2}  # most sequences of one answer
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

__all__ = ["DEFAULT_WEIGHTS", "Perceiver", "Query", "WeightsError", "Writing"]


class LaneShape(TypedDict):
    """Arguments of `Lane` that depend on what is written."""

    views: int
    prompt: int
    beams: int
    steps: int
    length_power: float


@dataclass(eq=False)
class Writing:
    """An answer in words that is being written: one sequence, or one for each number of a comparison."""

    query: Query
    pooled: Tensor  # [1, head] of its image
    lane: Lane
    comparison: Comparison | None
    said: dict[int, list[Hypothesis]] = field(default_factory=dict)  # of the sequences that have ended

    @property
    def texts(self) -> tuple[str, ...]:
        """What is asked, one text a sequence."""
        return self.comparison.questions() if self.comparison else (self.query.text,)


Part = tuple[Writing, int]  # a sequence of it


class Perceiver:
    """One loaded checkpoint. Not thread-safe: the engine is its only caller."""

    places = PLACES

    def __init__(self, weights: Path, device: str = "cpu", precision: str = Precision.AUTO) -> None:
        self.device = torch.device(device)
        dtype = serving_dtype(precision, self.device)
        loaded = load_checkpoint(weights, device)
        if dtype == torch.bfloat16:
            halve(loaded.model)
            if loaded.dense is not None:
                halve_dense(loaded.dense)
        if precision == Precision.INT8:
            quantise(loaded.model)
        self.model, self.config = loaded.model, loaded.model.config
        self.tokenizer, self.sentence_tokenizer = loaded.tokenizer, loaded.sentence_tokenizer
        self.calibration = loaded.calibration
        self.plan = self._plan(loaded.dense)
        self.cache: ByteCache[Any] = ByteCache(self.plan.cache)  # `Seen` of words, features of looks
        self.sentences = Sentences(self.model, self.sentence_tokenizer)
        self.dense: DensePerceiver | None = None
        if can_pack(self.device, dtype):
            pack_backbone(self.model.backbone)
            pack_fusion(self.model)
            pack_decoder(self.model.decoder)
            pack_projections(self.model.sentence)
            if loaded.dense is not None:
                pack_dense(loaded.dense)
        if loaded.dense is not None:
            self.dense = DensePerceiver(
                self.model.backbone, loaded.dense, loaded.dense_calibration, self.sentences.vectors, self.device,
                self.cache,
            )  # fmt: skip
        self.tasks: tuple[Task, ...] = (*WORDS, *DENSE) if self.dense else WORDS
        self.info = ModelInfo(
            model=self.config.name,
            weights_digest=loaded.digest,
            # In bfloat16 a GPU may have a flash package, and then its choice depends on the call.
            attention_backend=Backend.AUTO if self.device.type == "cuda" and dtype == torch.bfloat16 else Backend.SDPA,
            precision=computed_in(precision, dtype),
            device=device,
        )
        self.labels = SceneLabels(self.model, self.sentences)
        self.taxonomy = self.labels.taxonomy
        self._banned = torch.zeros(self.config.decoder.vocab_size, dtype=torch.bool, device=self.device)
        self._banned[[self.tokenizer.pad, *self.tokenizer.tasks.values()]] = True
        self._salt = f"{loaded.digest} {self.config.image_size}"
        self._lanes: dict[tuple[Task, Priority], Lane] = {
            (task, priority): Lane(
                self.model, sequences=PARTS[task] * self.plan.sequences, banned=self._banned,
                end=self.tokenizer.end, **shape,
            )
            for task, shape in self._lane_shapes.items()
            for priority in PRIORITIES
        }

    @property
    def _lane_shapes(self) -> dict[Task, LaneShape]:
        """How each kind of answer is written: read off all views, as captions and most answers are the same whichever
        way the image is turned."""
        visual = self.model.visual_tokens
        caption = LaneShape(
            views=self.config.views, prompt=visual + 1, beams=CAPTION_BEAMS, steps=CAPTION_TOKENS,
            length_power=CAPTION_LENGTH_POWER,
        )  # fmt: skip
        vqa = LaneShape(
            views=self.config.views, prompt=visual + self.config.sentence.max_tokens + 2,
            beams=ANSWER_BEAMS, steps=ANSWER_TOKENS, length_power=0.0,
        )  # fmt: skip
        return {"caption": caption, "vqa": vqa}

    def _plan(self, dense: DenseBranch | None) -> MemoryPlan:
        parts = [self.model] if dense is None else [self.model, dense]
        held = sum(weight.nbytes for part in parts for weight in part.parameters())
        sequence = sum(
            PARTS[task] * Lane.nbytes(self.model, s["views"], s["prompt"], s["beams"], s["steps"])
            for task, s in self._lane_shapes.items()
        )
        return MemoryPlan.of(free_memory(self.device), held, sequence, len(PRIORITIES))

    @classmethod
    def load(cls, weights: Path = DEFAULT_WEIGHTS, device: str = "cpu", precision: str = Precision.AUTO) -> Perceiver:
        """Raises WeightsError where the folder is not a checkpoint, UnknownPrecision where `precision` is none."""
        return cls(Path(weights), device, precision)

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
        """What of a request does not bear on its answer, or lies far from what the model learned."""
        told = [UNUSED_ANCHORS] if request.anchors else []
        if request.task == "detect_change" and request.text.strip():
            told.append("This model tells changed from unchanged ground, not one kind of change from another.")
        finest, coarsest = TRAINED_GSD_M
        if request.gsd_m is not None and not finest / 2 < request.gsd_m < coarsest * 2:
            told.append(
                f"A pixel that the model saw is {request.gsd_m:,.2f} m on the ground; it learned from {finest:g} to "
                f"{coarsest:g} m, so its answers are less reliable here, and their confidence too."
            )
        return told

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        """Answer a mixed batch, in order, as `begin` and `step` do it piece by piece.

        Raises:
            TaskNotServed: a query wants boxes, masks or change of a checkpoint without a dense branch.
        """
        answers: dict[int, TileAnswer] = {}
        dense = [i for i, q in enumerate(queries) if q.task in DENSE]
        waiting = deque(i for i, q in enumerate(queries) if q.task not in DENSE)
        writing: dict[Writing, int] = {}
        try:
            while dense or waiting or writing:
                rows = dense or self._next(waiting, queries)
                dense = []
                for i, outcome in zip(rows, self.begin([queries[i] for i in rows]), strict=True):
                    if isinstance(outcome, Writing):
                        writing[outcome] = i
                    else:
                        answers[i] = outcome
                for done, answer in self.step():
                    answers[writing.pop(done)] = answer
        finally:
            for left in writing:
                self.drop(left)
        return [answers[i] for i in range(len(queries))]

    def _next(self, waiting: deque[int], queries: Sequence[Query]) -> list[int]:
        """Rows taken from `waiting` for which there is room now."""
        rows: list[int] = []
        room = {task: self.room(task) for task in WORDS}
        while waiting and len(rows) < TOGETHER and room[queries[waiting[0]].task] > 0:
            room[queries[waiting[0]].task] -= 1
            rows.append(waiting.popleft())
        return rows

    def room(self, task: Task, priority: Priority = "interactive") -> int:
        """How many queries of a task may begin now."""
        lane = self._lanes.get((task, priority))
        return TOGETHER if lane is None else lane.free // PARTS[task]

    def fresh(self, query: Query) -> bool:
        """Whether its image must be encoded first; images of boxes, masks and change count as such always."""
        return query.task in DENSE or self._key(query) not in self.cache

    @torch.inference_mode()
    def begin(self, queries: Sequence[Query], priority: Priority = "interactive") -> list[TileAnswer | Writing]:
        """Take a mixed batch in: what needs no writing is answered at once, the rest goes on with every `step`.

        Queries on one image encode it once, apart for words and for boxes, masks and change. When it raises, nothing of
        the batch is left behind.

        Raises:
            TaskNotServed: a query wants boxes, masks or change of a checkpoint without a dense branch.
            IndexError: more captions or answers than there is `room` for.
        """
        outcomes: dict[int, TileAnswer | Writing] = {}
        dense = [i for i, q in enumerate(queries) if q.task in DENSE]
        if dense:
            if self.dense is None:
                raise TaskNotServed(queries[dense[0]].task, self.info.model, self.tasks)
            outcomes.update(zip(dense, self.dense.answer([queries[i] for i in dense]), strict=True))
        words = [i for i, q in enumerate(queries) if q.task not in DENSE]
        outcomes.update(zip(words, self._begin_words([queries[i] for i in words], priority), strict=True))
        return [outcomes[i] for i in range(len(queries))]

    @torch.inference_mode()
    def step(self, priority: Priority = "interactive") -> list[tuple[Writing, TileAnswer]]:
        """One more token of everything that is written at this priority; the answers that are complete with it."""
        done = []
        for (_, of), lane in self._lanes.items():
            if of == priority and len(lane):
                done += self._ended(lane.step())
        return done

    def writing(self, priority: Priority = "interactive") -> int:
        """Sequences that are being written."""
        return sum(len(lane) for (_, of), lane in self._lanes.items() if of == priority)

    def drop(self, writing: Hashable) -> None:
        """Nobody wants it any more: its places are free at once."""
        assert isinstance(writing, Writing)
        for i in range(len(writing.texts)):
            writing.lane.drop((writing, i))

    def free_memory(self) -> None:
        """Forget all that is kept of images."""
        self.cache.clear()

    def _begin_words(self, queries: Sequence[Query], priority: Priority) -> list[TileAnswer | Writing]:
        if not queries:
            return []
        seen = self._see(queries)
        outcomes: dict[int, TileAnswer | Writing] = {}
        labelled: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            if query.task == "classify":
                labelled[query.labels].append(i)
        for labels, rows in labelled.items():
            pooled = torch.cat([seen[i].pooled for i in rows])
            classes = self.labels.classes(pooled, labels, self.calibration.label_temperature)
            outcomes.update(zip(rows, classes, strict=True))
        with ExitStack() as undo:
            for task in ("caption", "vqa"):
                rows = [i for i, q in enumerate(queries) if q.task == task]
                if rows:
                    begun = self._write(task, [queries[i] for i in rows], [seen[i] for i in rows], priority, undo)
                    outcomes.update(zip(rows, begun, strict=True))
            undo.pop_all()
        for query, one in zip(queries, seen, strict=True):
            self.cache.put(self._key(query), one, one.nbytes)  # again: it has grown by what was made of it
        return [outcomes[i] for i in range(len(queries))]

    def _key(self, query: Query) -> Hashable:
        return self._salt, query.digest

    def _see(self, queries: Sequence[Query]) -> list[Seen]:
        """What is known of each query's image, encoded where nothing is."""
        known: dict[Hashable, Seen] = {}
        missing: dict[Hashable, np.ndarray] = {}
        for query in queries:
            key = self._key(query)
            if key not in known and key not in missing:
                found = self.cache.get(key)
                if found is None:
                    missing[key] = query.image
                else:
                    known[key] = found
        keys = list(missing)
        for start in range(0, len(keys), ENCODED):
            some = keys[start : start + ENCODED]
            known.update(zip(some, see(self.model, self._pixels([missing[key] for key in some])), strict=True))
        return [known[self._key(query)] for query in queries]

    def _write(self, task: Task, queries: Sequence[Query], seen: Sequence[Seen], priority: Priority,
               undo: ExitStack) -> list[TileAnswer | Writing]:  # fmt: skip
        """Prefill captions or answers to questions, and give them their places."""
        lane = self._lanes[task, priority]
        token = TASK_TOKEN[task]
        expert = route(token, self.config.decoder.experts)
        begun = [
            Writing(query, one.pooled, lane, read_comparison(query.text) if task == "vqa" else None)
            for query, one in zip(queries, seen, strict=True)
        ]
        parts: list[Part] = [(writing, i) for writing in begun for i in range(len(writing.texts))]
        images = [one for one, writing in zip(seen, begun, strict=True) for _ in writing.texts]
        asked = [writing.texts[i] for writing, i in parts]
        views = prefixes(self.model, images, lane.views, expert)
        if task == "vqa":
            views = [p.upright() if names_a_side(text) else p for p, text in zip(views, asked, strict=True)]
        prefix = Prefix.joined(views)
        repeated = [text for text in asked for _ in range(lane.views)]
        questions = self.sentences.questions(repeated) if task == "vqa" else None
        prompt = prefill(self.model, prefix, self.tokenizer.tasks[token], questions)
        for writing in begun:
            undo.callback(self.drop, writing)
        at_once = dict(self._ended(lane.join(parts, prompt)))
        return [at_once.get(writing, writing) for writing in begun]

    def _ended(self, sequences: Mapping[Hashable, list[Hypothesis]]) -> list[tuple[Writing, TileAnswer]]:
        """The answers that are complete with these sequences."""
        done = []
        for part, hypotheses in sequences.items():
            assert isinstance(part, tuple)
            writing, i = part
            writing.said[i] = hypotheses
            if len(writing.said) == len(writing.texts):
                done.append((writing, self._said(writing)))
        return done

    def _said(self, writing: Writing) -> TileAnswer:
        said = [
            [(self.tokenizer.decode(h.ids), h.logprob) for h in writing.said[i]] for i in range(len(writing.said))
        ]
        if writing.comparison:
            return comparison_answer(writing.comparison.kind, said[0], said[1], self.calibration)
        if writing.query.task == "vqa":
            return vqa_answer(said[0], self.calibration)
        best = most_agreed([text for text, _ in said[0]], [logprob for _, logprob in said[0]])
        text = sentence(said[0][best][0])
        if writing.query.detail == "full":
            text = " ".join([text, *self.labels.findings(writing.pooled, self.calibration.label_temperature)])
        return TileCaption(caption=text, confidence=self.calibration.caption(writing.said[0][best].score(1.0)))

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
        return self.model.heads.sentence_vectors(self.sentences.vectors(texts)).cpu().numpy()

    def prompt_tokens(self, request: PerceiveRequest, images: int) -> int:
        """Length of the sequences that the decoder reads before it answers: of each turned view of each image its
        visual tokens, the question's vector and tokens, and the task token. Classes, boxes, masks and change are read
        off vectors and maps: there it is the tokens of the phrases."""
        tokens = sum(len(self.sentence_tokenizer.encode(text).ids) for text in (request.text, *request.labels) if text)
        if request.task not in ("caption", "vqa"):
            return tokens
        question = 1 + tokens if request.task == "vqa" else 0
        return images * self.config.views * (self.model.visual_tokens + 1 + question)

    def answer_tokens(self, text: str) -> int:
        """Tokens of a text in the decoder's vocabulary."""
        return len(self.tokenizer.encode(text))

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        return sent(torch.stack([square(image, self.config.image_size) for image in images]), self.device)
