"""Boxes of a phrase as the decoder writes them (`[VG]`, hundredths of what it sees), asked as the dense heads are.

The decoder sees one square of its own size. So an image is looked at with the scales at which the dense branch looks,
each in overlapping squares, and what the looks say is combined as theirs is. A box's score is the mean probability
(geometric) of the tokens that write it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_server.checkpoints.store import load_checkpoint
from model_server.dense.known_phrases import KnownPhrases
from model_server.dense.scale_search import Sighting, combined
from model_server.dense.working_scale import bounded, box_scales
from model_server.evaluation.looking import merge_objects, windows
from model_server.model.backends import Backend
from model_server.model.greedy import follow
from model_server.model.looks import GREY
from model_server.model.rsvlm import RSVLM, Features, Questions
from model_server.model.vision import square
from model_server.protocol import ModelInfo, TaskNotServed, TileAnswer, TileObjects
from model_server.query import Query
from model_server.relations import parse
from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.text.malformed import MalformedText
from model_server.text.names import readable
from model_server.text.tokenizer import TextTokenizer
from model_server.training.region import BOX_TOKENS, MAX_BOXES, REGION, region_model

OVERLAP = 0.25  # of a square's side, shared by neighbours
BATCH = 32  # squares decoded together
Written = tuple[np.ndarray, np.ndarray]  # boxes [N, 4] and scores [N]


@torch.no_grad()
def write(model: RSVLM, tokenizer: TextTokenizer, features: Features, questions: Questions,
          side: int) -> list[Written]:  # fmt: skip
    """What the region expert writes about each image, in pixels of a square of `side`, in the order written."""
    n, steps = len(features.visual), BOX_TOKENS * MAX_BOXES
    tasks = torch.full((n,), tokenizer.tasks["[VG]"])
    expert = torch.full((n,), model.config.decoder.experts.index(REGION))
    logits, state = model.prefill(features, tasks, questions, expert, steps)
    ids, seen = follow(model.step, logits, state, steps, tokenizer.end)
    sure = seen.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return [_read(tokenizer, *row, side) for row in zip(ids.tolist(), sure.tolist(), strict=True)]


def _read(tokenizer: TextTokenizer, ids: Sequence[int], sure: Sequence[float], side: int) -> Written:
    """Boxes one by one; what cannot be read as one is left out."""
    boxes, scores, start = [], [], 0
    for i, token in enumerate(ids):
        if token == tokenizer.end:
            break
        if "]" not in tokenizer.decode([token]):
            continue
        part, start = slice(start, i + 1), i + 1
        try:
            found = parse_boxes(tokenizer.decode(ids[part]), BoxDialect.PERCENT, (side, side)).boxes
        except MalformedText:
            continue
        score = math.exp(sum(sure[part]) / len(sure[part]))
        for box in (b for b in found if b.x2 > b.x1 and b.y2 > b.y1):
            boxes.append((box.x1, box.y1, box.x2, box.y2))
            scores.append(score)
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, np.float64)


class TextGrounder:
    """A checkpoint with a trained region expert, whose `ground` answers come from text alone."""

    def __init__(self, weights: Path, expert: Path) -> None:
        """`expert`: what stage `region` has saved. Raises WeightsError where either does not fit."""
        loaded = load_checkpoint(weights)
        self.model, self.tokenizer = region_model(loaded.model, expert), loaded.tokenizer
        self.sentence_tokenizer, self.side = loaded.sentence_tokenizer, loaded.model.config.image_size
        self.phrases = KnownPhrases(lambda phrases: self.model.sentence(*self._sentence_ids(phrases))[1])
        self.info = ModelInfo(
            model=loaded.model.config.name, weights_digest=loaded.digest, attention_backend=Backend.SDPA,
            precision="float32", device="cpu",
        )  # fmt: skip

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        """Answer ground queries, in order. Raises TaskNotServed for others."""
        for query in queries:
            if query.task != "ground":
                raise TaskNotServed(query.task, self.info.model, ("ground",))
        relations = [parse(query.text) for query in queries]
        heads = [r.head if r else q.text for r, q in zip(relations, queries, strict=True)]
        meanings = self.phrases.read(heads)
        answers: list[TileAnswer] = []
        encoded: dict[tuple[int, float], _Squares] = {}
        found: dict[tuple[int, str], TileObjects] = {}
        for query, relation, head in zip(queries, relations, heads, strict=True):
            if (id(query.image), head) not in found:
                scales = box_scales(meanings[head].concept, query.modality, query.gsd_m)
                sightings = []
                for scale in sorted({bounded(s, query.image) for s in scales}):
                    squares = encoded.get((id(query.image), scale))
                    if squares is None:
                        squares = encoded[id(query.image), scale] = self._squares(query.image, scale)
                    sightings.append(self._look(squares, head))
                seen = combined(sightings)
                found[id(query.image), head] = TileObjects(
                    boxes=[(x1, y1, x2, y2) for x1, y1, x2, y2 in seen.boxes.tolist()],
                    scores=seen.scores.clamp(0, 1).tolist(), threshold=0.0, known=meanings[head].known,
                    scale=seen.scale,
                )  # fmt: skip
            answer = found[id(query.image), head]
            if relation is not None and answer.boxes:
                extent = (0, 0, query.image.shape[1], query.image.shape[0])
                row = relation.pick(np.array(answer.boxes), np.array(answer.scores), extent)
                answer = answer.model_copy(update={"boxes": [answer.boxes[row]], "scores": [answer.scores[row]]})
            answers.append(answer)
        return answers

    def _sentence_ids(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.sentence_tokenizer.encode_batch([readable(phrase) for phrase in phrases])
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded]).bool()

    def _squares(self, image: np.ndarray, scale: float) -> _Squares:
        side = self.side
        height, width = (max(round(n * scale), 1) for n in image.shape[:2])
        seen = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))
        cut = windows(width, height, side, round(OVERLAP * side))
        pixels = torch.stack([_padded(seen[y1:y2, x1:x2], side) for x1, y1, x2, y2 in cut])
        parts = [self.model.fuse(*self.model.backbone(x)) for x in pixels.split(BATCH)]
        return _Squares(cut, parts, scale, (image.shape[1] / width, image.shape[0] / height))

    def _look(self, squares: _Squares, phrase: str) -> Sighting:
        one = self.model.read_questions(*self._sentence_ids([phrase]))
        side = self.side
        written: list[Written] = []
        for features in squares.features:
            n = len(features.visual)
            asked = Questions(*(x.expand(n, *x.shape[1:]) for x in (one.states, one.vectors, one.mask)))
            written += write(self.model, self.tokenizer, features, asked, side)
        parts = []
        for window, (boxes, scores) in zip(squares.windows, written, strict=True):
            x1, y1, x2, y2 = window
            boxes = boxes.clip(0, [x2 - x1, y2 - y1] * 2)
            keep = ((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(1)
            rows = [(a, b, c, d) for a, b, c, d in boxes[keep].tolist()]
            parts.append(
                (window, TileObjects(boxes=rows, scores=scores[keep].clip(0, 1).tolist(), threshold=0.0, known=True,
                                     scale=squares.scale))
            )  # fmt: skip
        merged = merge_objects(parts)
        boxes = torch.tensor(merged.boxes, dtype=torch.float32).view(-1, 4) * torch.tensor([*squares.pixel] * 2)
        return Sighting(squares.scale, boxes, torch.tensor(merged.scores, dtype=torch.float32))


class _Squares:
    """An image at one scale: its squares and their features, and pixels of the image per pixel looked at."""

    def __init__(self, cut: list[tuple[int, int, int, int]], features: list[Features], scale: float,
                 pixel: tuple[float, float]) -> None:  # fmt: skip
        self.windows, self.features, self.scale, self.pixel = cut, features, scale, pixel


def _padded(image: np.ndarray, side: int) -> Tensor:
    """uint8 [3, side, side] with the image in its upper left and grey around, as in training."""
    if image.shape[:2] == (side, side):
        return square(image, side)
    out = np.full((side, side, 3), GREY, np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    return square(out, side)
