"""What the dense branch is held to: focal loss on centres, GIoU on boxes, BCE and Dice on masks and change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.dense import Found, cell_centres, to_pixels
from model_server.training.dense_data import Boxes, Changes, Masks

LEAST_CELLS = 3  # around the centre of a thing that is said to be in a view
LEAST_SHARE = 0.05  # of a view that a thing covers which is said to be in it
NEAR = 0.02  # a Gaussian's value from which a cell learns its object's box


def box_maps(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Gaussians around the centres of boxes [N, 4] on the stride-4 cells: the heat, and the weight of a box's cells.

    Both [N, H, W]. The heat's peak is exactly 1 at the cell nearest to the centre; its spread grows with the box
    along each axis (Liu et al. 2020). The weight is wider, and 0 outside the box.
    """
    x, y = cell_centres(height, width)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = boxes[:, 2:] - boxes[:, :2]
    near_x = (x[None] - centre[:, :1]).abs().argmin(1)
    near_y = (y[None] - centre[:, 1:]).abs().argmin(1)
    dx, dy = x[None] - x[near_x][:, None], y[None] - y[near_y][:, None]  # [N, W], [N, H]

    def gaussian(share: float, least: float) -> Tensor:
        sx, sy = (size * share + least).unbind(1)
        across, down = (torch.exp(-(d**2) / (2 * s[:, None] ** 2)) for d, s in ((dx, sx), (dy, sy)))
        return down[:, :, None] * across[:, None, :]

    heat, weight = gaussian(0.09, 1.2), gaussian(0.14, 1.6)
    in_x = (x[None] > boxes[:, :1]) & (x[None] < boxes[:, 2:3])
    in_y = (y[None] > boxes[:, 1:2]) & (y[None] < boxes[:, 3:4])
    inside = in_y[:, :, None] & in_x[:, None, :]
    peak = (dy == 0)[:, :, None] & (dx == 0)[:, None, :]
    return heat, weight * (inside | peak) * (weight > NEAR)


def focal(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Penalty-reduced focal loss of heat maps (Zhou et al. 2019, eq. 1), summed over centres' number (at least 1)."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = target == 1
    loss = torch.where(centre, (1 - p) ** 2 * F.softplus(-logits), (1 - target) ** 4 * p**2 * F.softplus(logits))
    return (loss * weight).sum() / (centre * weight).sum().clamp(min=1)


def giou_and_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised IoU (Rezatofighi et al. 2019) and IoU of paired boxes [N, 4]."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b))
    union = (area_a + area_b - shared).clamp(min=1e-6)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1).clamp(min=1e-6)
    iou = shared / union
    return iou - (hull - union) / hull, iou


def box_losses(found: Found, batch: Boxes) -> dict[str, Tensor]:
    """Heat of the asked phrases; boxes and their quality around every object, asked or not."""
    h, w = found.heat.shape[-2:]
    heat_target, heat_weight = torch.zeros_like(found.heat), torch.ones_like(found.heat)
    corners = found.boxes()
    predicted, truth, weights, quality = [], [], [], []
    for i, (boxes, meant, known) in enumerate(zip(batch.boxes, batch.meant, batch.known, strict=True)):
        unlabelled = ~batch.complete[i]
        heat_weight[i, unlabelled] = 0
        if not len(boxes):
            continue
        heat, weight = box_maps(boxes, h, w)
        heat_weight[i, unlabelled] = (weight.amax(0) > 0).float()
        for k in range(len(meant)):
            rows = meant[k] & known
            if rows.any():
                heat_target[i, k] = heat[rows].amax(0)
            fragments = meant[k] & ~known
            if fragments.any():
                heat_weight[i, k] *= (weight[fragments].amax(0) == 0) | (heat_target[i, k] > 0.5)
        weight = weight[known]
        if not len(weight):
            continue
        area = (boxes[known][:, 2:] - boxes[known][:, :2]).prod(1)
        claims = torch.where(weight > 0, area[:, None, None], torch.inf)
        owner = claims.argmin(0)  # [H, W]: of overlapping objects the smallest
        share = weight.gather(0, owner[None])[0]
        rows, columns = torch.nonzero(share > 0, as_tuple=True)
        owner, share = owner[rows, columns], share[rows, columns]
        total = torch.zeros(len(weight)).index_add_(0, owner, share)
        predicted.append(corners[i, :, rows, columns].T)
        truth.append(boxes[known][owner])
        weights.append(share / total[owner])  # each object counts as one
        quality.append(found.quality[i, rows, columns])
    losses = {"heat": focal(found.heat, heat_target, heat_weight)}
    unplaced = torch.stack(batch.somewhere)
    if unplaced.any():  # it is held to be where its centre looks likest
        losses["heat_somewhere"] = 0.2 * F.softplus(-found.heat[unplaced].flatten(1).topk(LEAST_CELLS).values).mean()
    if predicted:
        weight = torch.cat(weights)
        giou, iou = giou_and_iou(torch.cat(predicted), torch.cat(truth))
        right = F.binary_cross_entropy_with_logits(torch.cat(quality), iou.detach().clamp(0, 1), reduction="none")
        losses["box"] = 3.0 * ((1 - giou) * weight).sum() / weight.sum()
        losses["quality"] = 0.5 * (right * weight).sum() / weight.sum()
    return losses


def _bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * weight).sum() / weight.sum().clamp(min=1)


def _dice(logits: Tensor, target: Tensor, weight: Tensor, over: Sequence[int]) -> Tensor:
    """1 - Dice, summed over the dimensions `over`; the mean over those with any target."""
    p = logits.sigmoid() * weight
    target = target * weight
    shared, total = (p * target).sum(tuple(over)), (p + target).sum(tuple(over))
    there = (target.sum(tuple(over)) > 0).float()
    return ((1 - (2 * shared + 1) / (total + 1)) * there).sum() / there.sum().clamp(min=1)


def mask_losses(logits: Tensor, batch: Masks) -> dict[str, Tensor]:
    """Logits [B, K, H/4, W/4] on the pixels. What is somewhere in a view is held to be where it looks likest:
    the mean over the best `LEAST_SHARE` of the cells (multiple-instance learning)."""
    x = to_pixels(logits)
    losses = {
        "mask": _bce(x, batch.target, batch.weight),
        "mask_dice": 0.5 * _dice(x, batch.target, batch.weight, (2, 3)),
    }
    if batch.somewhere.any():
        cells = logits[batch.somewhere].flatten(1)  # [N, H/4 W/4]
        likest = cells.topk(max(int(LEAST_SHARE * cells.shape[1]), 1)).values
        losses["mask_somewhere"] = 0.05 * F.softplus(-likest).mean()
    return losses


def change_losses(logits: Tensor, batch: Changes) -> dict[str, Tensor]:
    """Logits [B, H/4, W/4] on the pixels; changed pixels count double, being rare."""
    x = to_pixels(logits[:, None])[:, 0]
    return {
        "change": _bce(x, batch.target, batch.weight * (1 + batch.target)),
        "change_dice": 0.5 * _dice(x, batch.target, batch.weight, (0, 1, 2)),
    }
