"""RSUniVLM: ChatML around a task token and the words of its demonstration (arXiv 2412.05679).

Its published examples fix the words for captions, boxes, masks and change; for classification they give the task token
alone, and the words here are ours. Boxes are hundredths of the image and masks a grid of labels, both of the whole
image whatever padding the tower saw, as its code has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model_server.checkpoints.adapters import rsunivlm
from model_server.checkpoints.files import read_json
from model_server.families.asking import Opened, Said
from model_server.families.dialect import WordDialect
from model_server.families.llava_speaker import LlavaSpeaker
from model_server.families.pictures import Processing, aspect_of
from model_server.families.reading import change, masks
from model_server.families.words import PICTURE, Words
from model_server.model.config import EXPERTS
from model_server.model.experts import ROUTES
from model_server.protocol import PerceiveRequest, Task, TileAnswer
from model_server.query import Query
from model_server.text.boxes import BoxDialect, ParsedBoxes, parse_boxes
from model_server.text.masks import MaskDialect, parse_mask

SYSTEM = "You are a helpful assistant."
TOKENS: dict[Task, str] = {
    "caption": "[CAP]", "vqa": "[VQA]", "classify": "[CLS]",
    "ground": "[VG]", "segment": "[SEG]", "detect_change": "[SEG]",
}  # fmt: skip
STEPS: dict[Task, int] = {
    "caption": 256, "vqa": 64, "classify": 0, "ground": 512, "segment": 4096, "detect_change": 4096,
}  # fmt: skip


HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation


def open_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Opened:
    """Raises WeightsError where a part is missing, does not fit or cannot be computed."""
    words, raw = Words.load(folder), read_json(folder / "config.json")
    model, _ = rsunivlm.load(folder, device=device, dtype=dtype)
    side, merge = model.config.vision.image_size, model.config.merge
    processing = Processing(size=side, mean=HALF, std=HALF, aspect=aspect_of(raw, merge), merge=merge)
    context = raw.get("max_position_embeddings", 32768)
    return Opened(RSUniVLMDialect(side), LlavaSpeaker(model, words, processing, prompt, context), (folder,))


def prompt(message: str, pictures: int = 1) -> str:
    """The whole text before the answer, `<image>` for each picture (the `qwen_1_5` conversation)."""
    shown = " ".join([PICTURE] * pictures)
    user = f"{shown}\n{message}" if pictures else message
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def expert_of(message: str) -> str:
    """The published router: by task tokens anywhere in the message, `[SEG]` before `[VG]` and `[REF]`; else image."""
    for token in ("[SEG]", "[VG]", "[REF]"):
        if token in message:
            return ROUTES[token]
    return EXPERTS[0]


class RSUniVLMDialect(WordDialect):
    """All six tasks. `side`: pixels a side of the square that the tower sees."""

    name = "rsunivlm"
    tasks: tuple[Task, ...] = ("caption", "vqa", "classify", "ground", "segment", "detect_change")
    steps = STEPS

    def __init__(self, side: int) -> None:
        self._side = side

    def route(self, task: Task) -> tuple[str, str]:
        return TOKENS[task], ROUTES[TOKENS[task]]

    def _expert(self, task: Task) -> int:
        return EXPERTS.index(self.route(task)[1])

    def read(self, query: Query, said: Sequence[Said]) -> TileAnswer:
        height, width = query.image.shape[:2]
        if query.task == "segment":
            grids = [parse_mask(one.text, MaskDialect.RSUNIVLM) for one in said]
            return masks(query, grids, said, self._scale(width, height))
        if query.task == "detect_change":
            return change(query, parse_mask(said[0].text, MaskDialect.RSUNIVLM), said[0], self._scale(width, height))
        return super().read(query, said)

    def _messages(self, query: Query) -> list[str]:
        return [f"{TOKENS[query.task]} {words}" for words in _words(query)]

    def _boxes(self, text: str, width: int, height: int) -> ParsedBoxes:
        return parse_boxes(text, BoxDialect.PERCENT, (width, height))

    def _scale(self, width: int, height: int) -> float:
        return self._side / max(height, width)

    def cautions(self, request: PerceiveRequest) -> list[str]:
        if request.task in ("segment", "detect_change"):
            return ["This checkpoint draws masks on a grid of about 24 x 24 cells: outlines are as coarse as these."]
        return []


def _words(query: Query) -> list[str]:
    """What follows the task token, for each message of a query."""
    text = query.text.strip()
    match query.task:
        case "caption":
            return ["Describe this image briefly." if query.detail == "short" else "Describe this image in detail."]
        case "vqa":
            return [text]
        case "classify":
            listed = ", ".join(query.labels)
            return [f"Classify the image within one of the given classes: {listed}. Answer with one word or phrase."]
        case "ground":
            return [f"Where is the {text.removeprefix('the ')}?"]
        case "segment":
            return [f"{label.strip()}." for label in query.labels]
        case "detect_change":
            kind = f"{text} area" if text else "area"
            return [f"Please segment the {kind} that have changed in the second image."]
