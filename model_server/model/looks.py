"""An image of any size as the dense branch sees it, the same at training's validation and at serving: resized to a
working scale, grey to the right and below up to multiples of 32; and the way back to the image's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.dense import COARSEST, to_pixels

GREY = 127


@dataclass(frozen=True)
class Frame:
    """Where an image lies in its look: `source` and `seen` are its (height, width) before and after resizing."""

    source: tuple[int, int]
    seen: tuple[int, int]

    @classmethod
    def of(cls, image: np.ndarray, scale: float) -> Frame:
        height, width = image.shape[:2]
        return cls((height, width), (max(round(height * scale), 1), max(round(width * scale), 1)))

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the look with its grey margin."""
        h, w = self.seen
        return h + -h % COARSEST, w + -w % COARSEST

    def look(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] of the source's size -> uint8 [3, H', W'] of the padded size."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        if self.seen != self.source:
            x = F.interpolate(x, self.seen, mode="bilinear", antialias=True)
        (h, w), (padded_h, padded_w) = self.seen, self.padded
        return F.pad(x, (0, padded_w - w, 0, padded_h - h), value=GREY)[0]

    def boxes_on_source(self, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] in pixels of the look -> in pixels of the source, cut to it. What lay in the margin is empty."""
        (h, w), (source_h, source_w) = self.seen, self.source
        cut = boxes.clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
        return cut * boxes.new_tensor([source_w / w, source_h / h] * 2)

    def logits_on_source(self, logits: Tensor) -> Tensor:
        """Stride-4 logits [K, h, w] of the look -> logits [K, H, W] on the source's pixels."""
        x = to_pixels(logits[None])[..., : self.seen[0], : self.seen[1]]
        if self.seen != self.source:
            x = F.interpolate(x, self.source, mode="bilinear", antialias=True)
        return x[0]


def stacked(frames: Sequence[Frame], images: Sequence[np.ndarray]) -> Tensor:
    """Looks of one padded size as a batch, uint8 [B, 3, H', W']."""
    return torch.stack([frame.look(image) for frame, image in zip(frames, images, strict=True)])
