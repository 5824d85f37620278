"""Windows of an image as training sees them: cut, scaled, turned, in other light and through other sensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.looks import GREY


@dataclass(frozen=True)
class Window:
    """A square of the source, `size` pixels a side from (left, top), seen at `side` pixels and turned."""

    left: int
    top: int
    size: int
    side: int
    turn: int = 0  # 0..7: quarter turns, from 4 on flipped

    @classmethod
    def draw(cls, rng: np.random.Generator, height: int, width: int, side: int, scale: float,
             focus: tuple[float, float] | None) -> Window:  # fmt: skip
        size = max(round(side / scale), 8)

        def start(length: int, at: float | None) -> int:
            low, high = sorted((0, length - size))
            if at is None or length < size:
                return int(rng.integers(low, high + 1))
            return int(np.clip(at - rng.uniform(0.1, 0.9) * size, low, high))

        x, y = focus if focus is not None else (None, None)
        return cls(start(width, x), start(height, y), size, side, int(rng.integers(8)))

    def cut(self, source: np.ndarray, fill: int) -> np.ndarray:
        """The window's pixels [size, size, ...], `fill` outside the source."""
        h, w = source.shape[:2]
        x1, y1 = max(self.left, 0), max(self.top, 0)
        x2, y2 = min(self.left + self.size, w), min(self.top + self.size, h)
        inside = source[y1:y2, x1:x2]
        if inside.shape[:2] == (self.size, self.size):
            return inside
        out = np.full((self.size, self.size, *source.shape[2:]), fill, source.dtype)
        out[y1 - self.top : y2 - self.top, x1 - self.left : x2 - self.left] = inside
        return out

    def image(self, source: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [3, side, side]."""
        x = torch.from_numpy(np.array(self.cut(source, GREY))).permute(2, 0, 1)[None]
        if self.size != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.turned(x[0])

    def plane(self, source: np.ndarray) -> Tensor:
        """bool or float [H, W] -> float [side, side]: the share of each pixel; 0 outside the source."""
        x = torch.from_numpy(self.cut(source, 0).astype(np.float32))[None, None]
        if self.size != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.turned(x[0])[0]

    def turned(self, x: Tensor) -> Tensor:
        x = torch.rot90(x, self.turn % 4, (1, 2))
        return x.flip(2) if self.turn >= 4 else x

    def corners(self, boxes: np.ndarray) -> np.ndarray:
        """Source boxes [N, 4] in pixels of the turned view, not clipped."""
        x1, y1, x2, y2 = ((boxes - [self.left, self.top] * 2) * (self.side / self.size)).T
        for _ in range(self.turn % 4):  # counter-clockwise: (x, y) -> (y, side - x)
            x1, y1, x2, y2 = y1, self.side - x2, y2, self.side - x1
        if self.turn >= 4:
            x1, x2 = self.side - x2, self.side - x1
        return np.stack((x1, y1, x2, y2), 1).astype(np.float32)


def relit(image: Tensor, rng: np.random.Generator, strength: float = 1.0) -> Tensor:
    """uint8 [3, S, S] in other light: contrast, brightness, gamma and colour, by a table of levels."""
    contrast, brightness = rng.uniform(1 - 0.25 * strength, 1 + 0.25 * strength, 2)
    gain = rng.uniform(1 - 0.07 * strength, 1 + 0.07 * strength, 3) * brightness
    gamma = float(np.exp(rng.uniform(-0.25, 0.25) * strength))
    x = image.numpy()
    mean = float(x[:, ::8, ::8].mean())
    levels = 255 * (np.arange(256) / 255) ** gamma
    table = ((levels[None] - mean) * contrast + mean * gain[:, None]).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(np.stack([table[c][x[c]] for c in range(3)]))


def degraded(image: Tensor, rng: np.random.Generator, sar: bool) -> Tensor:
    """What another sensor might have made of it: blur, noise, no colour; speckle in radar images."""
    side = image.shape[-1]
    if rng.random() < 0.15:
        small = max(round(side * rng.uniform(0.45, 0.9)), 8)
        x = F.interpolate(image[None], (small, small), mode="bilinear", antialias=True)
        image = F.interpolate(x, (side, side), mode="bilinear")[0]
    if sar and rng.random() < 0.5:
        looks = float(rng.uniform(4, 24))
        noise = rng.gamma(looks, 1 / looks, (side, side)).astype(np.float32)
        image = (image.float() * torch.from_numpy(noise)).clamp(0, 255).byte()
    elif not sar and rng.random() < 0.1:
        noise = rng.normal(0, rng.uniform(2, 8), image.shape).astype(np.float32)
        image = (image.float() + torch.from_numpy(noise)).clamp(0, 255).byte()
    if not sar and rng.random() < 0.1:
        image = image.float().mean(0, keepdim=True).byte().expand(3, -1, -1).contiguous()
    return image


def middles(boxes: np.ndarray, side: int, core: float) -> tuple[Tensor, Tensor]:
    """Pixels in the ellipse of `core` times a box's size, and those in a box but in no such ellipse: bool [S, S]."""
    middle, within = torch.zeros(side, side, dtype=torch.bool), torch.zeros(side, side, dtype=torch.bool)
    at = torch.arange(side) + 0.5
    for x1, y1, x2, y2 in boxes.tolist():
        if x2 <= 0 or y2 <= 0 or x1 >= side or y1 >= side:
            continue
        dx, dy = (at - (x1 + x2) / 2) / max(x2 - x1, 1) * 2, (at - (y1 + y2) / 2) / max(y2 - y1, 1) * 2
        within |= (dy.abs() <= 1)[:, None] & (dx.abs() <= 1)[None]
        middle |= (dy**2)[:, None] + (dx**2)[None] <= core**2
    return middle, within & ~middle


def pixel_of(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    """A random true pixel (x, y), or None."""
    rows, columns = np.nonzero(mask[::4, ::4])
    if not len(rows):
        return None
    i = int(rng.integers(len(rows)))
    return 4.0 * columns[i], 4.0 * rows[i]
