"""Objects found in several looks at one tile, as one list.

The look that is surest of what it sees (most expected hits, the unsure counting little) is taken whole. The others
add what it missed: boxes that none of those taken already covers, at a discount, since a thing that the best scale
did not see is more often a fault of the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.dense import box_iou

OTHERS = 0.7  # factor on the scores of looks that are not the surest
COVERED_IOU = 0.4
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
    surest, *others = sorted(sightings, key=lambda s: (-s.evidence, max(s.scale, 1 / s.scale)))
    boxes, scores = surest.boxes, surest.scores
    for other in others:
        fresh = ~_covered(other.boxes, boxes)
        boxes = torch.cat((boxes, other.boxes[fresh]))
        scores = torch.cat((scores, other.scores[fresh] * OTHERS))
    order = scores.argsort(descending=True, stable=True)
    return Sighting(surest.scale, boxes[order], scores[order])


def _covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Which boxes of [N, 4] overlap one of [M, 4], by IoU or by the share of the smaller of the two -> bool [N]."""
    if not len(boxes) or not len(by):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    low, high = torch.maximum(boxes[:, None, :2], by[None, :, :2]), torch.minimum(boxes[:, None, 2:], by[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area, other = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, by))
    smaller = torch.minimum(area[:, None], other[None]).clamp(min=1e-6)
    return ((box_iou(boxes, by) > COVERED_IOU) | (shared / smaller > COVERED_SHARE)).any(1)
