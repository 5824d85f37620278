"""MF-RSVLM (FUSE-RSVLM): the Vicuna conversation, and the words of its fine-tuning data, `{IT}`, `{VQA}`, `{VG}`.

Boxes are thousandths of the image, `[[x1,y1,x2,y2]]`. It was taught neither masks nor pairs of images. Its data have no
tag for classification, so that is asked as a question.
"""

from __future__ import annotations

from pathlib import Path

import torch

from model_server.checkpoints.adapters import mfrsvlm
from model_server.checkpoints.files import read_json
from model_server.checkpoints.hub import companion
from model_server.families.asking import Opened
from model_server.families.dialect import WordDialect
from model_server.families.llava_speaker import LlavaSpeaker
from model_server.families.pictures import Processing, aspect_of, clip_processing
from model_server.families.words import PICTURE, Words
from model_server.model.config import MergeConfig
from model_server.protocol import PerceiveRequest, Task
from model_server.query import Query
from model_server.text.boxes import BoxDialect, ParsedBoxes, parse_boxes

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
STEPS: dict[Task, int] = {"caption": 256, "vqa": 64, "classify": 0, "ground": 256}
TAGS: dict[Task, str] = {"caption": "{IT}", "vqa": "{VQA}", "classify": "{VQA}", "ground": "{VG}"}
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Opened:
    """Raises WeightsError where a part is missing, does not fit or cannot be computed."""
    words, raw = Words.load(folder), read_json(folder / "config.json")
    tower = companion(lambda: mfrsvlm.tower_of(folder, raw), raw.get("mm_vision_tower"))
    model, _ = mfrsvlm.load(folder, device=device, dtype=dtype, tower=tower)
    side = model.config.vision.image_size
    plain = Processing(
        size=side, mean=mfrsvlm.CLIP_MEAN, std=CLIP_STD, aspect=aspect_of(raw, MergeConfig()), crop=True
    )
    processing = clip_processing(tower / "preprocessor_config.json", plain)
    marked = bool(raw.get("mm_use_im_start_end"))
    speaker = LlavaSpeaker(
        model, words, processing, lambda message, pictures: prompt(message, pictures, marked),
        raw.get("max_position_embeddings", 4096),
    )  # fmt: skip
    return Opened(MFRSVLMDialect(side), speaker, (folder, tower))


def prompt(message: str, pictures: int = 1, marked: bool = False) -> str:
    """The whole text before the answer (the `vhm_v1` conversation); `marked`: the picture between its own tokens."""
    shown = f"<im_start>{PICTURE}<im_end>" if marked else PICTURE
    return f"{SYSTEM} USER: " + f"{shown}\n" * pictures + f"{message} ASSISTANT:"


class MFRSVLMDialect(WordDialect):
    """`side`: pixels a side of the square that the tower sees."""

    name = "mfrsvlm"
    steps = STEPS

    def __init__(self, side: int) -> None:
        self._side = side

    def route(self, task: Task) -> tuple[str, str]:
        return TAGS[task], "shared"

    def _messages(self, query: Query) -> list[str]:
        return [f"{TAGS[query.task]} {_words(query)}"]

    def _boxes(self, text: str, width: int, height: int) -> ParsedBoxes:
        return parse_boxes(text, BoxDialect.PERMILLE, (width, height))

    def _scale(self, width: int, height: int) -> float:
        return self._side / max(height, width)

    def cautions(self, request: PerceiveRequest) -> list[str]:
        if request.task == "ground":
            return ["This checkpoint was taught to name one box for a phrase: of several objects it may give one."]
        return []


def _words(query: Query) -> str:
    text = query.text.strip()
    if query.task == "caption":
        return "Describe the remote sensing image in detail."
    if query.task == "classify":
        return f"Which of these classes does the image show: {', '.join(query.labels)}? Answer briefly."
    if query.task == "vqa":
        return f"{text} Answer briefly."
    return (
        f"{text} Answer with bounding box coordinates in the format [x_min, y_min, x_max, y_max] scaled to 0-1000."
    )
