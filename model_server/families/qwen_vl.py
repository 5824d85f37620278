"""Opens plain Qwen2.5-VL: pictures at their own size, as far as the checkpoint's limits allow."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from model_server.checkpoints.adapters import qwen_vl
from model_server.checkpoints.adapters.fusar_inputs import MOST, PromptWriter, native_size
from model_server.checkpoints.files import read_json
from model_server.families.asking import Opened
from model_server.families.plain import PlainDialect
from model_server.families.qwen_speaker import QwenSpeaker
from model_server.families.words import Words
from model_server.text.boxes import BoxDialect, ParsedBoxes, parse_boxes

GROUNDING = (
    'Locate every object that matches "{}" and output the bbox coordinates in JSON format, as '
    '[{{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}]. If there is none, answer None.'
)


def open_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Opened:
    """Raises WeightsError where a part is missing, does not fit or cannot be computed."""
    words, raw = Words.load(folder), read_json(folder / "config.json")
    model, _ = qwen_vl.load(folder, device=device, dtype=dtype)
    writer = PromptWriter(folder, model.config)
    unit = model.config.vision.patch * model.config.vision.merge

    def size(width: int, height: int) -> tuple[int, int]:
        # The published limit would admit sixteen times as many pixels as are looked at here.
        return native_size(width, height, unit, writer.least, min(writer.most, MOST))

    def read(text: str, width: int, height: int) -> ParsedBoxes:
        return parse_boxes(text, BoxDialect.QWEN, (width, height), size(width, height))

    def scale(width: int, height: int) -> float:
        return math.sqrt(math.prod(size(width, height)) / (width * height))

    context = {**raw, **raw.get("text_config", {})}.get("max_position_embeddings", 32768)
    speaker = QwenSpeaker(model, words, writer, size, context)
    return Opened(PlainDialect(qwen_vl.NAME, GROUNDING, read, scale), speaker, (folder,))
