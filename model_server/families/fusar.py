"""FUSAR-GPT: Qwen2.5-VL fine-tuned on SAR, asked for boxes in the words of its published examples.

The words for the other tasks are ours. Its modulation needs AlphaEarth anchors of the scene: without them the visual
tokens stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch

from model_server.checkpoints.adapters import fusar
from model_server.checkpoints.adapters.fusar_inputs import PromptWriter
from model_server.checkpoints.files import read_json
from model_server.checkpoints.hub import companion
from model_server.families.asking import Opened
from model_server.families.dialect import WordDialect
from model_server.families.qwen_speaker import QwenSpeaker
from model_server.families.words import Words
from model_server.protocol import PerceiveRequest, Task
from model_server.query import Query
from model_server.text.boxes import BoxDialect, ParsedBoxes, parse_boxes

STEPS: dict[Task, int] = {"caption": 512, "vqa": 128, "classify": 0, "ground": 2048}
LEAD = "This is a SAR image."
_EXAMPLE = '{  "bbox_2d": [x1, y1, x2, y2], "label": "category name" }'
_NO_ANCHORS = (
    "This checkpoint was trained with AlphaEarth embeddings of the place; none came with this image, so nothing "
    "modulates its tokens. Name the raster of them in `embeddings`."
)
_OPTICAL = "This checkpoint was trained on SAR imagery; this is said to be optical."


def open_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Opened:
    """Raises WeightsError where a part is missing, does not fit or cannot be computed."""
    adapter = fusar.adapter_folder(folder)
    named = read_json(adapter / fusar.LORA).get("base_model_name_or_path")
    base = companion(lambda: fusar.base_folder(folder), named)
    said_by = adapter if (adapter / "preprocessor_config.json").is_file() else base  # as the authors' code chooses
    words = Words.load(said_by, base)
    model, _ = fusar.load(folder, device=device, dtype=dtype, base=base)
    side, raw = model.config.image_size, read_json(base / "config.json")
    context = {**raw, **raw.get("text_config", {})}.get("max_position_embeddings", 32768)
    writer = PromptWriter(said_by, model.config).squares()
    speaker = QwenSpeaker(model, words, writer, lambda width, height: (side, side), context)
    return Opened(FusarDialect(side), speaker, (folder, base))


class FusarDialect(WordDialect):
    """`side`: pixels of the square the picture is squashed to, the unit of boxes."""

    name = "fusar"
    steps = STEPS
    anchored = True

    def __init__(self, side: int) -> None:
        self._side = side

    def _messages(self, query: Query) -> list[str]:
        return [f"{LEAD} {_words(query)}"]

    def _boxes(self, text: str, width: int, height: int) -> ParsedBoxes:
        return parse_boxes(text, BoxDialect.QWEN, (width, height), (self._side, self._side))

    def _scale(self, width: int, height: int) -> float:
        return self._side / max(height, width)

    def cautions(self, request: PerceiveRequest) -> list[str]:
        missing = not any(len(known) for known in request.anchors)
        return [*([_NO_ANCHORS] if missing else []), *([_OPTICAL] if request.modality == "optical" else [])]


def detection(target: str) -> str:
    """The words of the published examples; the example's `'''json` is theirs."""
    return (
        f"Please carefully check the image and detect the following object: {target}. Output each detected target’s "
        "bbox coordinates in JSON format. The format of the bbox coordinates is:  "
        f"'''json [ {_EXAMPLE}, {_EXAMPLE} ]  '''  If there are no such targets in the image, simply respond with None."
    )


def _words(query: Query) -> str:
    text = query.text.strip()
    if query.task == "caption":
        return "Please describe it." if query.detail == "short" else "Please describe it in detail."
    if query.task == "classify":
        return f"Which of these does it show: {', '.join(query.labels)}? Answer with one of them only."
    return text if query.task == "vqa" else detection(text)
