"""What FUSAR-GPT is asked with, made as its code makes it: anchors, squashed pictures cut into patches, prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import UnsupportedLayout, require
from model_server.checkpoints.store import WeightsError
from model_server.model.config import QwenVisionConfig, QwenVLConfig

WIDTH = 64
PICTURES = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LEAST, MOST = 56 * 56, 1280 * 28 * 28  # pixels, where a checkpoint names no limits
_PLACES = ("lon", "lat", "row", "col", "x", "y")
_PLACEHOLDER = "<|image_pad|>"


class BadAnchors(ValueError):
    """A file of anchors does not hold what it must."""


def load_anchors(path: Path) -> tuple[Tensor, Tensor]:
    """Anchors of one image: vectors float32 [S, 64] and positions float32 [S, 2], (y, x) in 0..1.

    `.npz` holds `features` and `positions`, taken as they are. `.npy` is a table of lon, lat, row, col, x, y and the
    64 values, or a structured array with fields A00 to A63 and x, y (else col, row); each axis is spread over 0..1 from
    its least to its largest value, and one that is constant becomes 0.

    Raises:
        BadAnchors: another shape, no anchor, values that are not finite, or positions outside 0..1.
    """
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as data:
            if missing := {"features", "positions"} - set(data):
                raise BadAnchors(f"{path} has no {' and no '.join(sorted(missing))}")
            vectors, positions = (data[name].astype(np.float32) for name in ("features", "positions"))
    else:
        vectors, xs, ys = _table(np.load(path, allow_pickle=False), path)
        positions = np.column_stack([_spread(ys), _spread(xs)])
    if vectors.ndim != 2 or vectors.shape[1] != WIDTH or len(vectors) == 0:
        raise BadAnchors(f"{path}: the vectors must be [S, {WIDTH}] with S > 0; they are {list(vectors.shape)}")
    if positions.shape != (len(vectors), 2):
        raise BadAnchors(f"{path}: the positions must be [{len(vectors)}, 2]; they are {list(positions.shape)}")
    if not np.isfinite(vectors).all() or not ((positions >= 0) & (positions <= 1)).all():
        raise BadAnchors(f"{path}: vectors must be finite, and positions (y, x) within 0..1")
    return torch.from_numpy(vectors.copy()), torch.from_numpy(positions.copy())


def _table(array: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, x and y of an `.npy`."""
    if array.dtype.names:
        rows = array.reshape(-1)
        fields = [name for name in array.dtype.names if name not in _PLACES]
        fields.sort(key=lambda n: (0, int(n[1:])) if re.fullmatch(r"[aA]\d+", n) else (1, fields.index(n)))
        across, down = ("x", "y") if {"x", "y"} <= set(array.dtype.names) else ("col", "row")
        if not {across, down} <= set(array.dtype.names) or not fields:
            raise BadAnchors(f"{path} needs fields A00 to A63 with x and y, or col and row")
        return np.column_stack([rows[name] for name in fields]).astype(np.float32), rows[across], rows[down]
    columns = len(_PLACES) + WIDTH
    if array.ndim == 1 and array.size % columns == 0:
        array = array.reshape(-1, columns)
    if array.ndim != 2 or array.shape[1] != columns:
        raise BadAnchors(f"{path} must be a table of {columns} columns; it is {list(array.shape)}")
    return array[:, len(_PLACES) :].astype(np.float32), array[:, 4], array[:, 5]


def _spread(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    reach = np.ptp(values) if len(values) else 0
    return (values - values.min()) / reach if reach > 0 else np.zeros_like(values)


def cut_patches(image: Image.Image, config: QwenVLConfig, mean: Sequence[float], std: Sequence[float],
                size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:  # fmt: skip
    """A picture squashed to the model's square (bicubic), normalised and cut: patches [N, 3 * frames * patch^2] in the
    tower's order, and their grid (rows, columns). mean, std: of red, green, blue in 0..1, from the checkpoint. size:
    (width, height) instead of the square, multiples of patch times merge."""
    v = config.vision
    width, height = size or (config.image_size, config.image_size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(picture, np.float32) / 255  # [height, width, 3]
    values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    h, w = height // v.patch, width // v.patch
    cells = torch.from_numpy(values).view(h // v.merge, v.merge, v.patch, w // v.merge, v.merge, v.patch, 3)
    cells = cells.permute(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, v.patch, v.patch)
    return cells.expand(-1, -1, v.frames, -1, -1).reshape(h * w, -1), (h, w)


def _chat_template(folder: Path) -> str:
    """The chat template, in a file of its own or in a JSON file's field."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, str):
                return found
    raise WeightsError(f"{path} is missing, and no JSON file in {folder} holds a chat_template")


def _processing(raw: Mapping[str, Any], v: QwenVisionConfig) -> tuple[Sequence[float], Sequence[float], int, int]:
    """Mean, deviation, and the least and most pixels of a picture, of a preprocessor_config.json, newer or older.

    Raises:
        UnsupportedLayout: it asks for other steps than resizing, scaling by 1 / 255 and normalising, or other patches.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        require(raw, step, [True, None], PICTURES)
    for key, ours in (("patch_size", v.patch), ("temporal_patch_size", v.frames), ("merge_size", v.merge)):
        require(raw, key, [ours], PICTURES)
    require(raw, "resample", [Image.Resampling.BICUBIC], PICTURES)
    if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UnsupportedLayout(f"{PICTURES} has rescale_factor = {raw['rescale_factor']}; supported is 1 / 255")
    sides = raw.get("size") or {}
    least = raw.get("min_pixels") or sides.get("shortest_edge") or LEAST
    most = raw.get("max_pixels") or sides.get("longest_edge") or MOST
    return raw.get("image_mean") or CLIP_MEAN, raw.get("image_std") or CLIP_STD, least, most


def native_size(width: int, height: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """The size (width, height) at which Qwen-VL looks: multiples of `unit`, `least` to `most` pixels in all, the shape
    kept as far as that allows."""
    w, h = (max(round(side / unit), 1) * unit for side in (width, height))
    if w * h > most:
        beta = math.sqrt(width * height / most)
        w, h = (max(unit, math.floor(side / beta / unit) * unit) for side in (width, height))
    elif w * h < least:
        beta = math.sqrt(least / (width * height))
        w, h = (math.ceil(side * beta / unit) * unit for side in (width, height))
    return w, h


class PromptWriter:
    """Questions to token ids, by the chat template and tokenizer of an adapter's (or base's) folder. `mean`, `std`,
    `least` and `most` (pixels) are what that folder says of pictures."""

    def __init__(self, folder: Path, config: QwenVLConfig) -> None:
        """Raises WeightsError where the tokenizer or the template is missing, or pictures are processed otherwise."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file():
            raise WeightsError(f"{tokenizer} is missing")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(_chat_template(folder))
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self._config = config
        picture = read_json(folder / PICTURES)
        self.mean, self.std, self.least, self.most = _processing(picture, config.vision)

    def squares(self) -> PromptWriter:
        """This writer, for pictures that are squashed to the config's square.

        Raises:
            UnsupportedLayout: the limits of the folder would have that square resized once more.
        """
        side, unit = self._config.image_size, self._config.vision.patch * self._config.vision.merge
        seen = native_size(side, side, unit, self.least, self.most)
        if seen != (side, side):
            raise UnsupportedLayout(
                f"{PICTURES} admits {self.least} to {self.most} pixels: a picture squashed to {side} x {side} would be "
                f"resized to {seen[0]} x {seen[1]}; set min_pixels and max_pixels around {side * side}"
            )
        return self

    def ids(self, question: str, grid: tuple[int, int]) -> Tensor:
        """int [T], the answer to follow: the image first, wherever `<image>` stands in the question, then the text."""
        text = question.replace("<image>", "").strip()
        content = [{"type": "image"}, {"type": "text", "text": text}]
        said = self._template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        count = grid[0] * grid[1] // self._config.vision.merge**2
        said = said.replace(_PLACEHOLDER, _PLACEHOLDER * count, 1)
        return torch.tensor(self.tokenizer.encode(said, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """What generated ids say, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
