"""The dense branch: boxes and masks of any phrase, and the change between two images, at stride 4.

It shares the backbone's first blocks and owns a copy of the later ones, so that what it learns leaves captions and
answers alone. A top-down pyramid (FPN, Lin et al. 2017) with group norm brings strides 4 to 32 onto one stride-4 map.
A phrase's sentence vector becomes a query, whose product with each pixel's feature is the heat of object centres
(Zhou et al. 2019) or the mask. Boxes are distances to the four sides (TTFNet, Liu et al. 2020), whatever the phrase,
with a guess of their own IoU. Change is siamese: both images' maps and their difference, scale by scale.

Geometry: convolutions of stride 2 pad right and below only (see SameConv), so that cell i of a map of stride s has
its centre at pixel s i + s - 1. `upsample2` and `cell_centres` take that into account; a plain bilinear resize would
shift stride-4 answers by 1.5 pixels and deeper ones by more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import DenseConfig, ModelConfig
from model_server.model.vision import Backbone

STRIDE = 4
COARSEST = 32
BOX_UNIT = 8.0  # pixels; a distance of exp(0)
Maps = dict[int, Tensor]  # stride -> [B, C_s, H/s, W/s]


class SizeError(ValueError):
    """An image whose sides are not multiples of 32."""


def upsample2(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W], bilinear: fine cell 2i + 1 is coarse cell i, 2i lies between i - 1 and i."""
    h, w = x.shape[-2:]
    x = F.interpolate(F.pad(x, (1, 0, 1, 0), "replicate"), (2 * h + 1, 2 * w + 1), mode="bilinear", align_corners=True)
    return x[..., 1:, 1:]


def to_pixels(x: Tensor) -> Tensor:
    """A stride-4 map [B, K, H/4, W/4] on the pixels [B, K, H, W]."""
    return upsample2(upsample2(x))


def cell_centres(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """x [W] and y [H] of the stride-4 cells' centres, in pixels counted from the image's corner."""
    middle = STRIDE - 0.5
    x = torch.arange(width, device=device, dtype=torch.float32) * STRIDE + middle
    return x, torch.arange(height, device=device, dtype=torch.float32) * STRIDE + middle


def early_maps(backbone: Backbone, images: Tensor, shared: int) -> Maps:
    """uint8 [B, 3, H, W] -> maps of the strides that end within the first `shared` blocks, and the last block's.

    H and W are multiples of 32; raises SizeError otherwise.
    """
    if images.shape[-2] % COARSEST or images.shape[-1] % COARSEST:
        raise SizeError(f"sides are multiples of {COARSEST}, these are {tuple(images.shape[-2:])}; pad the image")
    return backbone.first_maps(images, shared)


class ConvGroup(nn.Sequential):
    """3x3 convolution, group norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.GroupNorm(groups, c_out), nn.ReLU())


class TopDown(nn.Module):
    """Maps of several strides onto the finest: each is projected, the coarser one's sum is added, both are smoothed."""

    def __init__(self, widths: dict[int, int], width: int, groups: int) -> None:
        super().__init__()
        self.strides = sorted(widths)
        self.lateral = nn.ModuleDict({str(s): nn.Conv2d(c, width, 1) for s, c in widths.items()})
        self.smooth = nn.ModuleDict({str(s): ConvGroup(width, width, groups) for s in widths})

    def forward(self, maps: Maps) -> Tensor:
        x: Tensor | None = None
        for s in reversed(self.strides):
            y = self.lateral[str(s)](maps[s])
            x = self.smooth[str(s)](y if x is None else y + upsample2(x))
        assert x is not None
        return x  # [B, width, H/4, W/4]


class Phrases(nn.Module):
    """Sentence vectors to queries and biases: how a phrase looks at pixels."""

    def __init__(self, sentence: int, query: int, bias: float) -> None:
        super().__init__()
        self.query = nn.Linear(sentence, query)
        self.bias = nn.Linear(sentence, 1)
        self.gain = math.sqrt(sentence)  # unit vectors to elements near 1
        nn.init.normal_(self.bias.weight, std=0.01)
        nn.init.constant_(self.bias.bias, bias)

    def forward(self, features: Tensor, phrases: Tensor) -> Tensor:
        """Features [B, Q, H, W] and sentence vectors [B, K, S] -> logits [B, K, H, W]."""
        phrases = phrases * self.gain
        queries = self.query(phrases)  # [B, K, Q]
        logits = torch.einsum("bkq,bqhw->bkhw", queries, features.to(queries.dtype)) / math.sqrt(features.shape[1])
        return logits.float() + self.bias(phrases)[..., None].float()


@dataclass
class Found:
    """What the detection head says of each stride-4 cell."""

    heat: Tensor  # [B, K, H/4, W/4], logit that an object of phrase k has its centre here
    distances: Tensor  # [B, 4, H/4, W/4], pixels to the left, top, right and bottom of the object here
    quality: Tensor  # [B, H/4, W/4], logit of that box's IoU

    def boxes(self) -> Tensor:
        """Corners [B, 4, H/4, W/4] in pixels: x1, y1, x2, y2."""
        h, w = self.distances.shape[-2:]
        x, y = cell_centres(h, w, self.distances.device)
        left, top, right, bottom = self.distances.unbind(1)
        return torch.stack((x - left, y[:, None] - top, x + right, y[:, None] + bottom), 1)


class ChangeHead(nn.Module):
    """Two images' maps to one logit a cell: |a - b|, a and b at each scale, and a top-down path over them."""

    def __init__(self, widths: dict[int, int], width: int, groups: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleDict({str(s): nn.Conv2d(c, width, 1) for s, c in widths.items()})
        self.compare = TopDown(dict.fromkeys(widths, 3 * width), width, groups)
        self.out = nn.Sequential(ConvGroup(width, width, groups), nn.Conv2d(width, 1, 1))
        nn.init.constant_(self.out[1].bias, -2.0)  # pyright: ignore[reportArgumentType] (a convolution's bias)

    def forward(self, before: Maps, after: Maps) -> Tensor:
        pairs = {}
        for s, m in before.items():
            reduce = self.reduce[str(s)]
            a, b = reduce(m), reduce(after[s])
            pairs[s] = torch.cat(((a - b).abs(), a, b), 1)
        return self.out(self.compare(pairs))[:, 0].float()  # [B, H/4, W/4]


class DenseBranch(nn.Module):
    """Everything behind the shared blocks: late blocks of its own, the pyramid and the three heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dense = config.dense
        if dense is None:
            raise ValueError(f"config {config.name!r} has no dense branch: its `dense` is None")
        self.config: DenseConfig = dense
        backbone = Backbone(config.backbone).fold_norms()
        self.blocks = nn.ModuleList(backbone.blocks[dense.shared :])
        self.strides = backbone.strides[dense.shared :]
        widths = {s: c for s, c in backbone.widths.items() if s >= STRIDE}
        w, t, g = dense.width, dense.tower, dense.groups
        self.pyramid = TopDown(widths, w, g)
        self.heat_tower, self.box_tower, self.mask_tower = (ConvGroup(w, t, g) for _ in range(3))
        self.heat_out, self.mask_out = nn.Conv2d(t, dense.query, 1), nn.Conv2d(t, dense.query, 1)
        self.box_out = nn.Conv2d(t, 5, 1)
        self.heat_phrases = Phrases(config.sentence.width, dense.query, -4.0)
        self.mask_phrases = Phrases(config.sentence.width, dense.query, -1.0)
        self.change_head = ChangeHead(widths, dense.change_width, g)

    def maps(self, early: Maps) -> Maps:
        """The output of `early_maps` -> maps of strides 4, 8, 16 and 32."""
        maps = dict(early)
        x = early[max(early)]
        for block, stride in zip(self.blocks, self.strides, strict=True):
            x = block(x)
            maps[stride] = x
        return maps

    def features(self, maps: Maps) -> Tensor:  # -> [B, width, H/4, W/4]
        return self.pyramid(maps)

    def detect(self, features: Tensor, phrases: Tensor) -> Found:
        """Features and sentence vectors [B, K, S] -> heat of each phrase, and boxes of whatever is there."""
        heat = self.heat_phrases(self.heat_out(self.heat_tower(features)), phrases)
        box = self.box_out(self.box_tower(features)).float()
        return Found(heat, box[:, :4].clamp(-5, 5).exp() * BOX_UNIT, box[:, 4])

    def segment(self, features: Tensor, phrases: Tensor) -> Tensor:
        """Features and sentence vectors [B, K, S] -> mask logits [B, K, H/4, W/4]."""
        return self.mask_phrases(self.mask_out(self.mask_tower(features)), phrases)

    def change(self, before: Maps, after: Maps) -> Tensor:
        """Maps of two images -> change logits [B, H/4, W/4]."""
        return self.change_head(before, after)


@dataclass(frozen=True)
class Detections:
    """Objects of one phrase in one image, best first."""

    boxes: Tensor  # float [N, 4], x1, y1, x2, y2 in pixels
    scores: Tensor  # float [N], 0..1


def box_overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area that each box of [N, 4] shares with each of [M, 4], [N, M]; areas [N, 1] and [M] of the boxes themselves."""
    x1, y1, x2, y2 = a[:, :, None].unbind(1)  # [N, 1] each
    u1, v1, u2, v2 = b.unbind(1)
    width = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
    shared = torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0).mul_(width)
    areas = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0), (u2 - u1).clamp(min=0) * (v2 - v1).clamp(min=0)
    return shared, *areas


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each box of [N, 4] with each of [M, 4] -> [N, M]."""
    shared, area, other = box_overlaps(a, b)
    return shared / (area + other - shared).clamp_(min=1e-6)


def leaders(boxes: Tensor, overlap: float) -> Tensor:
    """Greedy groups of boxes [N, 4] sorted best first: of each the row [N] of the best box that it belongs to, which it
    overlaps by more than this IoU; a leader is its own."""
    alike = (box_iou(boxes, boxes) > overlap).cpu().numpy()
    np.fill_diagonal(alike, False)
    found, free = np.arange(len(boxes)), np.ones(len(boxes), bool)
    for i in np.flatnonzero(alike.any(1)):  # the others are alone; numpy, as each turn of the loop is little work
        if free[i]:
            followers = alike[i] & free
            found[followers] = i
            free ^= followers
            free[i] = False
    return torch.from_numpy(found).to(boxes.device)


def suppress(boxes: Tensor, overlap: float) -> Tensor:
    """Greedy non-maximum suppression of boxes [N, 4] sorted best first: rows [M] of those that stay."""
    rows = torch.arange(len(boxes), device=boxes.device)
    return rows[leaders(boxes, overlap) == rows]


def vote(boxes: Tensor, voters: Tensor, weights: Tensor, agree: float = 0.65) -> Tensor:
    """Each box [M, 4] becomes the weighted mean of the voters [N, 4] that agree with it by IoU
    (Gidaris & Komodakis 2015); a box without any stays as it is."""
    votes = (box_iou(boxes, voters) > agree) * weights[None]  # [M, N]
    total = votes.sum(1, keepdim=True)
    return torch.where(total > 0, votes @ voters / total.clamp(min=1e-9), boxes)


def objects_of(found: Found, image: int, phrase: int, limit: int = 300, floor: float = 0.02,
               overlap: float = 0.5) -> Detections:  # fmt: skip
    """The objects of one phrase: local maxima of its heat, at most `limit`, scored sqrt(heat x quality)."""
    heat = found.heat[image, phrase].sigmoid()  # [h, w]
    score = (heat * found.quality[image].sigmoid()).sqrt()
    peak = heat == F.max_pool2d(heat[None, None], 3, 1, 1)[0, 0]
    boxes, score = found.boxes()[image].flatten(1).T, score.flatten()  # [h w, 4], [h w]
    best = torch.where(peak.flatten(), score, score.new_zeros(())).topk(min(limit, len(score)))
    rows = best.indices[best.values > floor]
    rows = rows[suppress(boxes[rows], overlap)]
    voters = score.topk(min(4 * limit, len(score))).indices
    voters = voters[score[voters] > floor]
    return Detections(vote(boxes[rows], boxes[voters], score[voters]), score[rows])


def start_branch(branch: DenseBranch, backbone: Backbone) -> None:
    """Copy the late blocks of a trained backbone, whose norms are folded, into the branch."""
    shared = branch.config.shared
    for mine, trained in zip(branch.blocks, list(backbone.blocks)[shared:], strict=True):
        mine.load_state_dict(trained.state_dict())


