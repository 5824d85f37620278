"""OpenAI chat completions, the answer: what the model found as text, with all that text cannot hold beside it.

Boxes are JSON as Qwen2.5-VL writes them (`text.boxes`), in pixels of the image that was sent, with a score each.
Masks and change are JSON with shares, extents and a coarse grid of labels in the run-length form of Text4Seg
(`text.masks`): the wire for masks by the pixel is /v1/perceive. The object `perception` of a completion holds the
calibrated confidence.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_server.http.usage import Usage
from model_server.protocol import PerceiveRequest, PerceiveResponse, RankedAnswer, TileMasks, TileObjects
from model_server.text.masks import BACKGROUND, LabelGrid, MaskDialect, write_mask

GRID = 32  # cells along the longer side of a mask as text


@dataclass(frozen=True)
class Said:
    """An answer as text, and how sure it is.

    Attributes:
        confidence: calibrated chance that the answer is right; of boxes the best one's; None for masks and change,
            which have no single one.
        abstained: the confidence is below the level at which this model's answers are worth giving.
        others: what else might have been said.
    """

    text: str
    confidence: float | None
    abstained: bool = False
    others: Sequence[RankedAnswer] = ()


def say(request: PerceiveRequest, response: PerceiveResponse) -> Said:
    """The answer to a request of one tile, or one pair."""
    if response.captions:
        return Said(response.captions[0].caption, response.captions[0].confidence)
    if response.vqa:
        answer = response.vqa[0]
        return Said(answer.answer, answer.confidence, answer.abstained, answer.alternatives)
    if response.classes:
        found = response.classes[0]
        ranked = sorted(zip(found.scores, found.labels, strict=True), reverse=True)
        others = [RankedAnswer(answer=label, confidence=min(score, 1.0)) for score, label in ranked[1:4]]
        return Said(ranked[0][1], min(ranked[0][0], 1.0), others=others)
    if response.objects:
        return _boxes(request.text, response.objects[0])
    if response.masks:
        return _masks(response.masks[0])
    change = response.changes[0]
    return _masks(
        TileMasks(
            labels=["changed"], thresholds=[change.threshold], known=[True], scale=change.scale,
            probabilities=change.probabilities[None],
        )
    )  # fmt: skip


def _boxes(phrase: str, found: TileObjects) -> Said:
    """Those from the model's own threshold on, best first."""
    rows = [
        {"bbox_2d": [round(side, 1) for side in box], "label": phrase, "score": round(score, 4)}
        for box, score in zip(found.boxes, found.scores, strict=True)
        if score >= found.threshold
    ]
    return Said(json.dumps(rows, ensure_ascii=False), max(found.scores, default=None) if rows else None)


def _masks(found: TileMasks) -> Said:
    pairs = zip(found.probabilities, found.thresholds, strict=True)
    above = np.stack([plane >= 255 * threshold - 1e-6 for plane, threshold in pairs])  # [K, H, W]
    classes = [
        {"label": label, "share": round(float(mask.mean()), 4), "bbox_2d": _extent(mask)}
        for label, mask in zip(found.labels, above, strict=True)
    ]
    return Said(json.dumps({"classes": classes, "mask": _grid(found.labels, above)}, ensure_ascii=False), None)


def _extent(mask: np.ndarray) -> list[int] | None:
    """x1, y1, x2, y2 around all pixels of a mask; None where there are none."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _grid(labels: Sequence[str], above: np.ndarray) -> str:
    """Masks bool [K, H, W] as rows of runs; a cell belongs to the class that covers most of it, from a half on."""
    _, height, width = above.shape
    scale = min(1.0, GRID / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    sums = np.add.reduceat(np.add.reduceat(above.astype(np.int32), top, axis=1), left, axis=2)
    sizes = np.outer(np.diff([*top, height]), np.diff([*left, width]))
    shares = sums / sizes
    values = np.where(shares.max(0) >= 0.5, shares.argmax(0) + 1, 0).astype(np.int16)
    names = (BACKGROUND, *(re.sub(r"[\s*|,<>:]+", " ", label).strip()[:80] or "class" for label in labels))
    return write_mask(LabelGrid(names, values), MaskDialect.TEXT4SEG)


def shortened(text: str, limit: int | None, count: Callable[[str], int]) -> str:
    """The text, or as many of its first words as are at most `limit` tokens by `count`."""
    if limit is None or count(text) <= limit:
        return text
    words = re.findall(r"\S+\s*|\s+", text)
    while words and count("".join(words)) > limit:
        words.pop()
    return "".join(words).rstrip()


# --- as OpenAI words it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """One answer on its way out.

    Attributes:
        cut: the text was shortened to the number of tokens asked for.
        logprobs: whether the caller wants the confidence as a log probability too.
    """

    id: str
    response: PerceiveResponse
    request: PerceiveRequest
    said: Said
    text: str
    cut: bool
    usage: Usage | None
    logprobs: bool

    def whole(self) -> dict[str, Any]:
        """A chat.completion object."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = self._choice(self._finish) | {"message": message, "logprobs": self._logprobs()}
        head = self._head("chat.completion", int(time.time()))
        return head | {"choices": [choice], "usage": self.usage, "perception": self._perception()}

    def chunks(self, usage: bool) -> Iterator[dict[str, Any]]:
        """chat.completion.chunk objects: the role, the words one by one, how it ended and what is known of it, and the
        usage if wanted. The words are known together: an answer is chosen among whole candidates."""
        head = self._head("chat.completion.chunk", int(time.time()))
        yield head | {"choices": [self._choice(None) | {"delta": {"role": "assistant", "content": ""}}]}
        for number, word in enumerate(re.findall(r"\S+\s*|\s+", self.text)):
            choice = self._choice(None) | {"delta": {"content": word}}
            if number == 0:
                choice["logprobs"] = self._logprobs()
            yield head | {"choices": [choice]}
        last = self._choice(self._finish) | {"delta": {}}
        yield head | {"choices": [last], "perception": self._perception()}
        if usage:
            yield head | {"choices": [], "usage": self.usage}

    @property
    def _finish(self) -> str:
        return "length" if self.cut else "stop"

    def _head(self, kind: str, created: int) -> dict[str, Any]:
        model = self.response.model
        fingerprint = f"fp_{model.weights_digest[:12]}"
        return {
            "id": self.id, "object": kind, "created": created, "model": model.model, "system_fingerprint": fingerprint,
        }  # fmt: skip

    def _choice(self, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "finish_reason": finish, "logprobs": None}

    def _logprobs(self) -> dict[str, Any] | None:
        """The answer as one token: clients that drop `perception` keep log probabilities."""
        if not self.logprobs or self.said.confidence is None:
            return None
        best = RankedAnswer(answer=self.text, confidence=self.said.confidence)
        ranked = [
            {"token": a.answer, "logprob": math.log(max(a.confidence, 1e-9)), "bytes": list(a.answer.encode())}
            for a in (best, *self.said.others)
        ]
        return {"content": [ranked[0] | {"top_logprobs": ranked}], "refusal": None}

    def _perception(self) -> dict[str, Any]:
        response = self.response
        return {
            "task": self.request.task,
            "confidence": self.said.confidence,
            "abstained": self.said.abstained,
            "alternatives": [other.model_dump() for other in self.said.others],
            "kind": response.vqa[0].kind if response.vqa else None,
            "known": _known(response),
            "warnings": response.warnings,
            "task_token": response.task_token,
            "expert": response.expert,
            **response.model.model_dump(),
            "elapsed_s": round(response.elapsed_s, 4),
        }


def _known(response: PerceiveResponse) -> bool | None:
    """Whether the model was trained on anything like the phrase or classes; None where there are none."""
    told = [*(one.known for one in response.objects), *(known for one in response.masks for known in one.known)]
    return all(told) if told else None
