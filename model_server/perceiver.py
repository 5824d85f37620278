"""The resident model as one object: a mixed batch of tile questions in, calibrated answers out.

Knows pixels and text, nothing of rasters, HTTP or queues.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

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
from model_server.model.experts import ROUTES
from model_server.model.seen import Seen, see
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
)
from model_server.query import TASK_TOKEN, Query
from model_server.scene_labels import SceneLabels
from model_server.sentences import Sentences
from model_server.serving_form import cast, pack
from model_server.writing import PARTS, PRIORITIES, Writer, Writing, bytes_of_each

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "nano"
WORDS: tuple[Task, ...] = ("caption", "vqa", "classify")  # answered from the pooled image and the decoder
DENSE: dict[Task, str] = {"ground": "region", "segment": "pixel", "detect_change": "pixel"}  # and its granularity
TRAINED_GSD_M = (0.15, 10.0)  # metres per pixel of the training images, from the finest set to the coarsest
ENCODED = 4  # images at a time: with sixteen, all of whose views leave the processor's caches, it takes longer
PLACES: dict[Priority, int] = {"interactive": 8, "bulk": 2}  # new tiles of a pass
TOGETHER = 16  # images that `answer` takes in at a time

__all__ = ["DEFAULT_WEIGHTS", "Perceiver", "Query", "WeightsError"]


class Perceiver:
    """One loaded checkpoint. Not thread-safe: the engine is its only caller."""

    places = PLACES

    def __init__(self, weights: Path, device: str = "cpu", precision: str = Precision.AUTO) -> None:
        self.device = torch.device(device)
        dtype = serving_dtype(precision, self.device)
        loaded = load_checkpoint(weights, device)
        cast(loaded, precision, dtype)
        self.model, self.config = loaded.model, loaded.model.config
        self.tokenizer, self.sentence_tokenizer = loaded.tokenizer, loaded.sentence_tokenizer
        self.calibration = loaded.calibration
        self.plan = self._plan(loaded.dense)
        pack(loaded, self.device, dtype)
        self.cache: ByteCache[Any] = ByteCache(self.plan.cache)  # `Seen` of words, features of looks
        self.sentences = Sentences(self.model, self.sentence_tokenizer)
        self.dense: DensePerceiver | None = None
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
        self._salt = f"{loaded.digest} {self.config.image_size}"
        self.writer = Writer(
            self.model, self.tokenizer, self.sentences, self.labels, self.calibration, self.plan.sequences
        )

    def _plan(self, dense: DenseBranch | None) -> MemoryPlan:
        parts = [self.model] if dense is None else [self.model, dense]
        held = sum(weight.nbytes for part in parts for weight in part.parameters())
        return MemoryPlan.of(free_memory(self.device), held, bytes_of_each(self.model), len(PRIORITIES))

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
        return self.writer.room(task, priority) if task in PARTS else TOGETHER

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
        return self.writer.step(priority)

    def writing(self, priority: Priority = "interactive") -> int:
        """Sequences that are being written."""
        return self.writer.sequences(priority)

    def drop(self, writing: Hashable) -> None:
        """Nobody wants it any more: its places are free at once."""
        assert isinstance(writing, Writing)
        self.writer.drop(writing)

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
        written = [i for i, q in enumerate(queries) if q.task in PARTS]
        begun = self.writer.begin([queries[i] for i in written], [seen[i] for i in written], priority)
        outcomes.update(zip(written, begun, strict=True))
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
            known.update(zip(some, see(self.model, self.pixels([missing[key] for key in some])), strict=True))
        return [known[self._key(query)] for query in queries]

    @torch.inference_mode()
    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, D] unit rows in which images described alike lie close: image vector and caption words."""
        pooled = self.model.encode(self.pixels(images)).pooled
        heads = self.model.heads
        words = F.normalize(heads.concepts(pooled).sigmoid().sqrt(), dim=-1)
        return (torch.cat((heads.image_vectors(pooled), words), -1) / math.sqrt(2)).cpu().numpy()

    @torch.inference_mode()
    def image_vectors(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, E] unit rows of the contrastive head; their products with `text_vectors` rank captions."""
        return self.model.heads.image_vectors(self.model.encode(self.pixels(images)).pooled).cpu().numpy()

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, E] unit rows of the contrastive head."""
        return self.model.heads.sentence_vectors(self.sentences.vectors(texts)).cpu().numpy()

    def prompt_tokens(self, request: PerceiveRequest, images: int) -> int:
        """Length of the sequences that the decoder reads before it answers: of each turned view of each image its
        visual tokens, the question's vector and tokens, and the task token. Classes, boxes, masks and change are read
        off vectors and maps: there it is the tokens of the phrases."""
        tokens = sum(len(self.sentence_tokenizer.encode(text).ids) for text in (request.text, *request.labels) if text)
        if request.task not in PARTS:
            return tokens
        question = 1 + tokens if request.task == "vqa" else 0
        return images * self.config.views * (self.model.visual_tokens + 1 + question)

    def answer_tokens(self, text: str) -> int:
        """Tokens of a text in the decoder's vocabulary."""
        return len(self.tokenizer.encode(text))

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [N, 3, side, side] on the device, as the model takes them."""
        return sent(torch.stack([square(image, self.config.image_size) for image in images]), self.device)
