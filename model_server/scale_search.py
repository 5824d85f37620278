"""Objects found in several looks at one tile, as one list.

The look that is surest of what it sees (most expected hits, the unsure counting little) is believed. What only
another look sees counts less: more often than not it is a fault of that scale. Where boxes of different looks cover
each other the better one stays, so that a large ship is not also its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_server.model.dense import box_iou

OTHERS = 0.7  # factor on the scores of what the surest look does not see
SAME_IOU = 0.4
COVERED_SHARE = 0.7  # of the smaller box's area


@dataclass(frozen=True)
class Sighting:
    """Boxes [N, 4] in the tile's pixels and calibrated scores [N], best first, of one look."""

    scale: float
    boxes: Tensor
    scores: Tensor

    @property
    def evidence(self) -> float:
        return float(self.scores.square().sum())


def combined(sightings: Sequence[Sighting]) -> Sighting:
    """One list of all looks' objects, best first; `scale` is that of the surest look, where nobody sees anything the
    one nearest to 1."""
    looks = sorted(sightings, key=lambda s: (-s.evidence, max(s.scale, 1 / s.scale)))
    surest = looks[0]
    if len(looks) == 1:
        return surest
    boxes = torch.cat([s.boxes for s in looks])
    look = torch.tensor([i for i, s in enumerate(looks) for _ in range(len(s.boxes))], device=boxes.device)
    seen = (look == 0) | (box_iou(boxes, surest.boxes) > SAME_IOU).any(1)
    scores = torch.cat([s.scores for s in looks]) * torch.where(seen, 1.0, OTHERS)
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, look = boxes[order], scores[order], look[order]
    rival = (_covering(boxes) & (look[:, None] != look[None])).cpu().numpy()
    alive = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if alive[i]:
            alive[i + 1 :] &= ~rival[i, i + 1 :]
    kept = torch.from_numpy(alive).to(boxes.device)
    return Sighting(surest.scale, boxes[kept], scores[kept])


def _covering(boxes: Tensor) -> Tensor:
    """Which boxes of [N, 4] overlap each other, by IoU or by the share of the smaller one -> bool [N, N]."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    smaller = torch.minimum(area[:, None], area[None]).clamp(min=1e-6)
    return (box_iou(boxes, boxes) > SAME_IOU) | (shared / smaller > COVERED_SHARE)
