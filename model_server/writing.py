"""Captions and answers to questions, written a token at a time by lanes of the decoder.

A lane writes one kind of answer at one priority, so that neither waits for places of the other. An answer takes one
sequence, or one for each number of a comparison.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypedDict, get_args

import torch
from torch import Tensor

from model_server.calibration import Calibration
from model_server.model.experts import route
from model_server.model.generate import Hypothesis
from model_server.model.rsvlm import RSVLM
from model_server.model.seen import Seen, prefixes
from model_server.model.slots import Lane, Prefix, prefill
from model_server.protocol import Priority, Task, TileAnswer, TileCaption
from model_server.query import TASK_TOKEN, Query
from model_server.scene_labels import SceneLabels
from model_server.sentences import Sentences
from model_server.text.agreement import most_agreed
from model_server.text.comparison import Comparison, read_comparison
from model_server.text.sides import names_a_side
from model_server.text.tokenizer import TextTokenizer
from model_server.wording import comparison_answer, sentence, vqa_answer

CAPTION_BEAMS, CAPTION_TOKENS, CAPTION_LENGTH_POWER = 3, 40, 0.3
ANSWER_BEAMS, ANSWER_TOKENS = 5, 16
PARTS: dict[Task, int] = {"caption": 1, "vqa": 2}  # most sequences of one answer
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


class LaneShape(TypedDict):
    """Arguments of `Lane` that depend on what is written."""

    views: int
    prompt: int
    beams: int
    steps: int
    length_power: float


def lane_shapes(model: RSVLM) -> dict[Task, LaneShape]:
    """How each kind of answer is written: read off all views, as captions and most answers are the same whichever way
    the image is turned."""
    config, visual = model.config, model.visual_tokens
    caption = LaneShape(
        views=config.views, prompt=visual + 1, beams=CAPTION_BEAMS, steps=CAPTION_TOKENS,
        length_power=CAPTION_LENGTH_POWER,
    )  # fmt: skip
    vqa = LaneShape(
        views=config.views, prompt=visual + config.sentence.max_tokens + 2, beams=ANSWER_BEAMS, steps=ANSWER_TOKENS,
        length_power=0.0,
    )  # fmt: skip
    return {"caption": caption, "vqa": vqa}


def bytes_of_each(model: RSVLM) -> int:
    """Of the keys and values of one answer of each kind, added up."""
    return sum(
        PARTS[task] * Lane.nbytes(model, s["views"], s["prompt"], s["beams"], s["steps"])
        for task, s in lane_shapes(model).items()
    )


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


class Writer:
    """The lanes of a model, and what is said in them.

    Args:
        labels: names what is surely to be seen, for full captions.
        sequences: places of each kind and priority, in answers.
    """

    def __init__(self, model: RSVLM, tokenizer: TextTokenizer, sentences: Sentences, labels: SceneLabels,
                 calibration: Calibration, sequences: int) -> None:  # fmt: skip
        self._model, self._tokenizer, self._sentences = model, tokenizer, sentences
        self._labels, self._calibration = labels, calibration
        # bool [vocabulary], what is never said
        self.banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool, device=model.queries.device)
        self.banned[[tokenizer.pad, *tokenizer.tasks.values()]] = True
        self._lanes: dict[tuple[Task, Priority], Lane] = {
            (task, priority): Lane(
                model, sequences=PARTS[task] * sequences, banned=self.banned, end=tokenizer.end, **shape
            )
            for task, shape in lane_shapes(model).items()
            for priority in PRIORITIES
        }

    def room(self, task: Task, priority: Priority) -> int:
        """How many captions, or answers, may begin now."""
        return self._lanes[task, priority].free // PARTS[task]

    def sequences(self, priority: Priority) -> int:
        """That are being written."""
        return sum(len(lane) for (_, of), lane in self._lanes.items() if of == priority)

    def begin(self, queries: Sequence[Query], seen: Sequence[Seen],
              priority: Priority) -> list[TileAnswer | Writing]:  # fmt: skip
        """Take captions and questions in, each on an image that has been seen. When it raises, nothing of them is left.

        Raises:
            IndexError: more captions or answers than there is `room` for.
        """
        outcomes: dict[int, TileAnswer | Writing] = {}
        with ExitStack() as undo:
            for task in PARTS:
                rows = [i for i, q in enumerate(queries) if q.task == task]
                if rows:
                    begun = self._begin(task, [queries[i] for i in rows], [seen[i] for i in rows], priority, undo)
                    outcomes.update(zip(rows, begun, strict=True))
            undo.pop_all()
        return [outcomes[i] for i in range(len(queries))]

    def step(self, priority: Priority) -> list[tuple[Writing, TileAnswer]]:
        """One more token of everything that is written at this priority; the answers that are complete with it."""
        done = []
        for (_, of), lane in self._lanes.items():
            if of == priority and len(lane):
                done += self._ended(lane.step())
        return done

    def drop(self, writing: Writing) -> None:
        """Its places are free at once."""
        for i in range(len(writing.texts)):
            writing.lane.drop((writing, i))

    def _begin(self, task: Task, queries: Sequence[Query], seen: Sequence[Seen], priority: Priority,
               undo: ExitStack) -> list[TileAnswer | Writing]:  # fmt: skip
        """Prefill captions or answers to questions, and give them their places."""
        lane = self._lanes[task, priority]
        token = TASK_TOKEN[task]
        expert = route(token, self._model.config.decoder.experts)
        begun = [
            Writing(query, one.pooled, lane, read_comparison(query.text) if task == "vqa" else None)
            for query, one in zip(queries, seen, strict=True)
        ]
        parts: list[Part] = [(writing, i) for writing in begun for i in range(len(writing.texts))]
        images = [one for one, writing in zip(seen, begun, strict=True) for _ in writing.texts]
        asked = [writing.texts[i] for writing, i in parts]
        views = prefixes(self._model, images, lane.views, expert)
        if task == "vqa":
            views = [p.upright() if names_a_side(text) else p for p, text in zip(views, asked, strict=True)]
        prefix = Prefix.joined(views)
        repeated = [text for text in asked for _ in range(lane.views)]
        questions = self._sentences.questions(repeated) if task == "vqa" else None
        prompt = prefill(self._model, prefix, self._tokenizer.tasks[token], questions)
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
            [(self._tokenizer.decode(h.ids), h.logprob) for h in writing.said[i]] for i in range(len(writing.said))
        ]
        if writing.comparison:
            return comparison_answer(writing.comparison.kind, said[0], said[1], self._calibration)
        if writing.query.task == "vqa":
            return vqa_answer(said[0], self._calibration)
        best = most_agreed([text for text, _ in said[0]], [logprob for _, logprob in said[0]])
        text = sentence(said[0][best][0])
        if writing.query.detail == "full":
            text = " ".join([text, *self._labels.findings(writing.pooled, self._calibration.label_temperature)])
        return TileCaption(caption=text, confidence=self._calibration.caption(writing.said[0][best].score(1.0)))
