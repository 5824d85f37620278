"""Objects found in several looks at one tile, as one list.

A look and those at the next scales vote: boxes that agree become their weighted mean, scored by the mean over these
looks (weighted boxes fusion, Solovyev et al. 2021). Of all such votes the one whose best objects are the surest is
believed. A sum over all objects would not do to choose: the larger a ship is seen, the more of its parts pass for
ships, each with some confidence; for the same reason a vote at smaller scales needs a little less of it. What only a
look at a far scale sees is added at a discount, but where anything covers it already: parts of a thing are not things
of their own, nor is a group of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_server.model.dense import box_iou, box_overlaps, leaders

NEARBY = 2.1  # the next look votes where its scale is within this factor
COARSE = 0.1  # sureness counts by scale to minus this power
AGREE_IOU = 0.5
BEST = 3  # objects that speak for a look or a vote
OTHERS = 0.5  # factor on the scores of what only far looks see
SAME_IOU = 0.4
COVERED_SHARE = 0.5  # of the smaller box's area


@dataclass(frozen=True)
class Sighting:
    """Boxes [N, 4] in the tile's pixels and scores [N], best first, of one look."""

    scale: float
    boxes: Tensor
    scores: Tensor


def combined(sightings: Sequence[Sighting]) -> Sighting:
    """One list of all looks' objects, best first; `scale` is that of the surest look of those believed, where nobody
    sees anything the one nearest to 1."""
    looks = sorted(sightings, key=lambda s: s.scale)
    plainest = min(looks, key=_plainness)
    if not any(len(look.scores) for look in looks):
        return plainest
    votes = [(looks[i].scale, near, _fused([looks[j] for j in near])) for i, near in _neighbours(looks)]
    _, near, (boxes, scores) = max(votes, key=lambda vote: _sureness(vote[2][1]) * vote[0] ** -COARSE)
    surest = min((looks[i] for i in near), key=lambda look: (-_sureness(look.scores), _plainness(look)))
    for i, other in enumerate(looks):
        if i not in near:
            fresh = ~_covered(other.boxes, boxes)
            boxes = torch.cat((boxes, other.boxes[fresh]))
            scores = torch.cat((scores, other.scores[fresh] * OTHERS))
    order = scores.argsort(descending=True, stable=True)
    return Sighting(surest.scale, boxes[order], scores[order])


def _plainness(look: Sighting) -> float:
    return max(look.scale, 1 / look.scale)


def _sureness(scores: Tensor) -> float:
    """Mean of the best of [N], best first; one found alone is enough."""
    return float(scores[:BEST].mean()) if len(scores) else 0.0


def _neighbours(looks: Sequence[Sighting]) -> list[tuple[int, list[int]]]:
    """Who votes together: a look, by its place in ascending order of scale, with the next on either side. The coarsest
    of several votes with the next one only, not first: what it sees, that one sees better."""
    found = []
    for i, look in enumerate(looks):
        near = [j for j in (i - 1, i, i + 1) if 0 <= j < len(looks) and _factor(look, looks[j]) <= NEARBY]
        if i > 0 or near == [0]:
            found.append((i, near))
    return found


def _factor(a: Sighting, b: Sighting) -> float:
    return max(a.scale / b.scale, b.scale / a.scale)


def _fused(looks: Sequence[Sighting]) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] and scores [N] that the looks agree on, best first; each look has one vote on a box, and a blank one
    counts."""
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
    order = total.argsort(descending=True, stable=True)
    return (sums / total.clamp(min=1e-9)[:, None])[order], total[order] / len(looks)


def _covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Which boxes of [N, 4] overlap one of [M, 4], by IoU or by the share of the smaller of the two -> bool [N]."""
    shared, area, other = box_overlaps(boxes, by)
    smaller = torch.minimum(area, other).clamp(min=1e-6)
    return ((box_iou(boxes, by) > SAME_IOU) | (shared / smaller > COVERED_SHARE)).any(1)
