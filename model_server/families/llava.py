"""Opens plain LLaVA, of the original layout or that of `transformers`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from model_server.checkpoints.adapters import llava
from model_server.checkpoints.adapters.mfrsvlm import CLIP_MEAN
from model_server.checkpoints.files import read_json
from model_server.checkpoints.hub import companion
from model_server.families import mfrsvlm
from model_server.families.asking import Opened
from model_server.families.llava_speaker import LlavaSpeaker, PromptText
from model_server.families.pictures import Processing, aspect_of, clip_processing
from model_server.families.plain import PlainDialect, square_boxes
from model_server.families.words import PICTURE, Words
from model_server.model.config import MergeConfig

GROUNDING = "Please provide the bounding box coordinate of the region this sentence describes: {}."


def open_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Opened:
    """Raises WeightsError where a part is missing, does not fit or cannot be computed."""
    raw = read_json(folder / "config.json")
    original = llava.is_original(raw)
    tower = companion(lambda: llava.tower_of(folder, raw), raw.get("mm_vision_tower")) if original else folder
    words = Words.load(folder)
    model, _ = llava.load(folder, device=device, dtype=dtype, tower=tower)
    if not original:
        words = words.with_picture(raw.get("image_token_index", raw.get("image_token_id")))
    side = model.config.vision.image_size
    aspect = aspect_of(raw, MergeConfig()) if original else "square"
    plain = Processing(size=side, mean=CLIP_MEAN, std=mfrsvlm.CLIP_STD, aspect=aspect, crop=True)
    processing = clip_processing(tower / "preprocessor_config.json", plain)
    cropped = processing.crop and aspect != "pad"

    def scale(width: int, height: int) -> float:
        return side / (min(width, height) if cropped else max(width, height))

    dialect = PlainDialect(llava.NAME, GROUNDING, partial(square_boxes, cropped=cropped), scale)
    speaker = LlavaSpeaker(model, words, processing, _prompt(raw, original), _context(raw))
    return Opened(dialect, speaker, (folder, tower) if original else (folder,))


def _prompt(raw: dict[str, Any], original: bool) -> PromptText:
    if original:
        marked = bool(raw.get("mm_use_im_start_end"))
        return lambda message, pictures: mfrsvlm.prompt(message, pictures, marked)
    return lambda message, pictures: f"USER: {PICTURE}\n{message} ASSISTANT:"


def _context(raw: dict[str, Any]) -> int:
    return raw.get("text_config", raw).get("max_position_embeddings", 2048)
