"""Objects found in several looks at one tile, as one list.

The look whose best objects are the surest is believed. A sum over all of its objects would not do: the larger a ship
is seen, the more of its parts pass for ships, each with some confidence. What only another look sees is added at a
discount, but where anything covers it already: parts of a thing are not things of their own, nor is a group of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.dense import box_iou

BEST = 3  # objects that speak for a look
OTHERS = 0.5  # factor on the scores of what only other looks see
SAME_IOU = 0.4
COVERED_SHARE = 0.5  # of the smaller box's area


@dataclass(frozen=True)
class Sighting:
    """Boxes [N, 4] in the tile's pixels and calibrated scores [N], best first, of one look."""

    scale: float
    boxes: Tensor
    scores: Tensor

    @property
    def sureness(self) -> float:
        """Mean score of the best objects; one found alone is enough."""
        return float(self.scores[:BEST].mean()) if len(self.scores) else 0.0


def combined(sightings: Sequence[Sighting]) -> Sighting:
    """One list of all looks' objects, best first; `scale` is that of the surest look, where nobody sees anything the
    one nearest to 1."""
    surest, *others = sorted(sightings, key=lambda s: (-s.sureness, max(s.scale, 1 / s.scale)))
    boxes, scores = surest.boxes, surest.scores
    for other in others:
        fresh = ~_covered(other.boxes, boxes)
        boxes = torch.cat((boxes, other.boxes[fresh]))
        scores = torch.cat((scores, other.scores[fresh] * OTHERS))
    order = scores.argsort(descending=True, stable=True)
    return Sighting(surest.scale, boxes[order], scores[order])


def _covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Which boxes of [N, 4] overlap one of [M, 4], by IoU or by the share of the smaller of the two -> bool [N]."""
    low, high = torch.maximum(boxes[:, None, :2], by[None, :, :2]), torch.minimum(boxes[:, None, 2:], by[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area, other = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, by))
    smaller = torch.minimum(area[:, None], other[None]).clamp(min=1e-6)
    return ((box_iou(boxes, by) > SAME_IOU) | (shared / smaller > COVERED_SHARE)).any(1)
