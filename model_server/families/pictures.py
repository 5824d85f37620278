"""Pixels as published models were given them: padded or squashed squares, tiled pictures, shortest side and crop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import UnsupportedLayout, require
from model_server.model.config import MergeConfig
from model_server.model.merging import best_grid

_RESAMPLING = frozenset({Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS})


@dataclass(frozen=True, kw_only=True)
class Processing:
    """Of one picture to the square a tower takes.

    aspect: `pad` to a square in the colour of `mean` first, `anyres` = an overview and tiles; else as it is.
    crop: the shortest side becomes `size`, then the middle is cut out (CLIP); else width and height do (SigLIP).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aspect: str = "square"
    crop: bool = False
    resample: Image.Resampling = Image.Resampling.BICUBIC
    merge: MergeConfig = field(default_factory=MergeConfig)

    def views(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> normalised float32 [T, 3, size, size]: the picture, or its overview and then its tiles."""
        picture = Image.fromarray(image)
        if self.aspect.startswith("anyres"):
            views = [picture.resize((self.size, self.size), Image.Resampling.BICUBIC), *self._tiles(picture)]
        else:
            views = [self._padded(picture) if self.aspect == "pad" else picture]
        return torch.stack([self._normalised(view) for view in views])

    def _padded(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        return square

    def _tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The picture as large as fits into its grid of tiles, in its middle, on black; row by row."""
        columns, rows = (n // self.merge.tile for n in best_grid(picture.size, self.merge.grids))
        width, height = columns * self.size, rows * self.size
        across, down = width / picture.width, height / picture.height
        if across < down:
            fitted = (width, min(math.ceil(picture.height * across), height))
        else:
            fitted = (min(math.ceil(picture.width * down), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            picture.resize(fitted, Image.Resampling.BICUBIC), ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
        )
        corners = [(x, y) for y in range(0, height, self.size) for x in range(0, width, self.size)]
        return [canvas.crop((x, y, x + self.size, y + self.size)) for x, y in corners]

    def _normalised(self, picture: Image.Image) -> Tensor:
        """[3, size, size]."""
        values = np.asarray(self._square(picture), np.float32) * np.float32(1 / 255)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()

    def _square(self, picture: Image.Image) -> Image.Image:
        if not self.crop:
            return picture.resize((self.size, self.size), self.resample)
        short = min(picture.size)
        width, height = (int(self.size * side / short) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        cut = (left, top, left + self.size, top + self.size)
        return picture.resize((width, height), self.resample).crop(cut)


def aspect_of(raw: Mapping[str, Any], merge: MergeConfig) -> str:
    """`image_aspect_ratio` of a config.json.

    Raises:
        UnsupportedLayout: another one than pad, square and anyres, or anyres without grids.
    """
    aspect = raw.get("image_aspect_ratio") or "square"
    if aspect == "anyres" or "anyres_max" in aspect:
        if not merge.grids:
            raise UnsupportedLayout("config.json has image_aspect_ratio = anyres and no image_grid_pinpoints")
        return "anyres"
    if aspect not in ("pad", "square"):
        raise UnsupportedLayout(
            f"config.json has image_aspect_ratio = {aspect!r}; supported are pad, square, anyres and anyres_max_N"
        )
    return aspect


def clip_processing(path: Path, defaults: Processing) -> Processing:
    """Processing as a CLIP tower's preprocessor_config.json has it, where it is there; else `defaults`.

    Raises:
        UnsupportedLayout: it asks for another kind of processing.
    """
    if not path.is_file():
        return defaults
    raw = read_json(path)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        require(raw, step, [True, None], path.name)
    require(raw, "do_pad", [False, None], path.name)
    if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UnsupportedLayout(f"{path} has rescale_factor = {raw['rescale_factor']}; supported is 1 / 255")
    size, crop = raw.get("size", defaults.size), raw.get("crop_size", defaults.size)
    side = _side(size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size, path)
    cut = _side(crop.get("height") if isinstance(crop, dict) else crop, path)
    resample = raw.get("resample", defaults.resample)
    if resample not in _RESAMPLING:
        raise UnsupportedLayout(f"{path} has resample = {resample!r}; supported are {sorted(_RESAMPLING)}")
    if raw.get("do_center_crop", True) and cut != side:
        raise UnsupportedLayout(f"{path} resizes to {side} and crops {cut}; the two must be one size")
    exact = isinstance(size, dict) and "shortest_edge" not in size
    if not exact and defaults.aspect != "pad":  # a picture padded to a square has nothing to crop
        require(raw, "do_center_crop", [True, None], path.name)
    return Processing(
        size=side,
        mean=tuple(raw.get("image_mean", defaults.mean)),
        std=tuple(raw.get("image_std", defaults.std)),
        aspect=defaults.aspect,
        crop=not exact,
        resample=Image.Resampling(resample),
        merge=defaults.merge,
    )


def _side(value: object, path: Path) -> int:
    if not isinstance(value, int) or value < 1:
        raise UnsupportedLayout(f"{path} has no size in pixels that can be read; it is {value!r}")
    return value
