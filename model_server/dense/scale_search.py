"""Objects found in several looks at one tile, as one list.

The look whose best objects are the surest is believed, and looks at nearby scales vote with it: boxes of different
looks that agree become their weighted mean, scored by the mean over these looks (weighted boxes fusion, Solovyev et al.
2021). A sum over all objects would not do to choose: the larger a ship is seen, the more of its parts pass for ships,
each with some confidence. What only a look at a far scale sees is added at a discount, but where anything covers it
already: parts of a thing are not things of their own, nor is a group of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_server.model.dense import box_iou, box_overlaps, leaders

NEARBY = 2.1  # looks within this factor of the surest one's scale vote
AGREE_IOU = 0.5
BEST = 3  # objects that speak for a look
OTHERS = 0.5  # factor on the scores of what only far looks see
SAME_IOU = 0.4
COVERED_SHARE = 0.5  # of the smaller box's area


@dataclass(frozen=True)
class Sighting:
    """Boxes [N, 4] in the tile's pixels and scores [N], best first, of one look."""

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
    surest = min(sightings, key=lambda s: (-s.sureness, max(s.scale, 1 / s.scale)))
    near = [s for s in sightings if max(s.scale / surest.scale, surest.scale / s.scale) <= NEARBY]
    boxes, scores = _fused(near)
    for other in sightings:
        if all(other is not s for s in near):
            fresh = ~_covered(other.boxes, boxes)
            boxes = torch.cat((boxes, other.boxes[fresh]))
            scores = torch.cat((scores, other.scores[fresh] * OTHERS))
    order = scores.argsort(descending=True, stable=True)
    return Sighting(surest.scale, boxes[order], scores[order])


def _fused(looks: Sequence[Sighting]) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] and scores [N] that the looks agree on; each look has one vote on a box, and a blank one counts."""
    if len(looks) == 1:
        return looks[0].boxes, looks[0].scores
    boxes, scores = torch.cat([s.boxes for s in looks]), torch.cat([s.scores for s in looks])
    voter = torch.cat([torch.full((len(s.boxes),), i, device=boxes.device) for i, s in enumerate(looks)])
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, voter = boxes[order], scores[order], voter[order]
    votes = leaders(boxes, AGREE_IOU) * len(looks) + voter
    votes, first = np.unique(votes.cpu().numpy(), return_index=True)  # the best of each look on each thing
    things, of = np.unique(votes // len(looks), return_inverse=True)
    rows, of = torch.from_numpy(first).to(boxes.device), torch.from_numpy(of).to(boxes.device)
    weight = scores[rows]
    total = weight.new_zeros(len(things)).index_add(0, of, weight)
    sums = boxes.new_zeros(len(things), 4).index_add(0, of, boxes[rows] * weight[:, None])
    return sums / total.clamp(min=1e-9)[:, None], total / len(looks)


def _covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Which boxes of [N, 4] overlap one of [M, 4], by IoU or by the share of the smaller of the two -> bool [N]."""
    shared, area, other = box_overlaps(boxes, by)
    smaller = torch.minimum(area, other).clamp(min=1e-6)
    return ((box_iou(boxes, by) > SAME_IOU) | (shared / smaller > COVERED_SHARE)).any(1)
