"""Token-wise linear modulation, TLM: what is known of a place changes how its pixels are read (FUSAR-GPT).

Anchors are places in an image, each with a vector of world knowledge (an AlphaEarth embedding). Every vector becomes a
scale and a shift of the channels,

    (1)  (gamma_i, beta_i) = W2 SiLU(W1 v_i + b1) + b2,

which Gaussian weights around the anchors spread over the grid of patches,

    (2)  w_i(y, x) = exp(-|(y, x) - a_i|^2 / (2 sigma^2)),   w_i <- w_i / (sum_j w_j + 1e-6),
    (3)  gamma(y, x) = sum_i w_i gamma_i,   beta(y, x) = sum_i w_i beta_i,

and, averaged over the patches that share a token, modulate the tokens of the vision tower,

    (4)  x' = x (1 + gamma) + beta.

The equations are numbered here; the published code is their source. Far from all anchors the weights vanish, by the
1e-6 of (2), and tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import ModulationConfig

_EPS = 1e-6
_NOWHERE = 1e4  # so far off that padding has no weight, not even where masked anchors count ("twice")

Grid = tuple[int, int]  # rows and columns of patches


@dataclass
class Anchors:
    """Anchors of B images, padded to the same number S; rows of `mask` may be all False: nothing is known there."""

    vectors: Tensor  # float [B, S, V]
    positions: Tensor  # float [B, S, 2], (y, x) in 0..1 of the image
    mask: Tensor  # bool [B, S], True = a real anchor

    @classmethod
    def of(cls, images: Sequence[tuple[Tensor, Tensor] | None], width: int) -> Anchors:
        """Pad the (vectors [S, V], positions [S, 2]) of each image; None where an image has no anchors."""
        most = max((len(image[0]) for image in images if image is not None), default=0)
        vectors = torch.zeros(len(images), most, width)
        positions = torch.full((len(images), most, 2), _NOWHERE)
        mask = torch.zeros(len(images), most, dtype=torch.bool)
        for row, image in enumerate(images):
            if image is not None:
                count = len(image[0])
                vectors[row, :count], positions[row, :count], mask[row, :count] = *image, True
        return cls(vectors, positions, mask)

    def to(self, device: torch.device | str) -> Anchors:
        return Anchors(self.vectors.to(device), self.positions.to(device), self.mask.to(device))


class TokenModulation(nn.Module):
    """Equations (1) to (4) over packed tokens of images of any sizes.

    The last layer starts at zero, so that an untrained module changes nothing. (The published code starts it at
    random.) An image without anchors keeps its tokens bit for bit.
    """

    def __init__(self, config: ModulationConfig, width: int) -> None:
        """width: channels of the tokens."""
        super().__init__()
        self.config = config
        hidden = max(128, config.hidden_mult * width)
        first, last = nn.Linear(config.vector_width, hidden), nn.Linear(hidden, 2 * width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.film = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, x: Tensor, grids: Sequence[Grid], anchors: Anchors | None) -> Tensor:
        """Modulate the tokens of B images.

        Args:
            x: [N, C], images one after the other, each row by row: rows*columns / merge^2 tokens.
            grids: of each image, its rows and columns of patches; multiples of `config.merge`.
            anchors: of the same B images; None where nothing is known of any.

        Returns:
            [N, C], the same tokens where an image has no anchors.

        Raises:
            ValueError: the tokens do not fit the grids, or the anchors are of another number of images.
        """
        counts = [self._tokens(grid) for grid in grids]
        if x.shape[0] != sum(counts):
            raise ValueError(f"{x.shape[0]} tokens came, but the grids {list(grids)} have {sum(counts)}")
        if anchors is None or anchors.vectors.shape[1] == 0:
            return x
        if anchors.vectors.shape[0] != len(grids):
            raise ValueError(f"anchors of {anchors.vectors.shape[0]} images came for {len(grids)}")
        # Half-precision tokens are modulated in their own precision, as published.
        half = x.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(x.device.type, x.dtype if half else torch.bfloat16, enabled=half):
            film = self.film(anchors.vectors.to(next(self.film.parameters()).dtype)).to(x.dtype)  # [B, S, 2C], (1)
            tokens = list(x.split(counts))
            for grid in set(grids):  # images of one size together
                rows = [i for i, other in enumerate(grids) if other == grid]
                own = torch.stack([tokens[i] for i in rows])  # [b, n, C]
                mask = anchors.mask[rows]
                weights = self.weights(grid, anchors.positions[rows], mask)  # [b, S, H, W], (2)
                field = weights.flatten(2).transpose(1, 2) @ film[rows]  # [b, H*W, 2C], (3)
                gamma, beta = self._to_tokens(field, grid).chunk(2, -1)  # [b, n, C] each
                known = mask.any(1)[:, None, None]  # decided on the device, without waiting for it
                for i, done in zip(rows, torch.where(known, own * (1 + gamma) + beta, own), strict=True):  # (4)
                    tokens[i] = done
        return torch.cat(tokens)

    def weights(self, grid: Grid, positions: Tensor, mask: Tensor) -> Tensor:
        """Equation (2): float32 [..., S, H, W] weights of anchors at positions [..., S, 2] on H x W patches."""
        c = self.config
        spot = []
        for axis, side in enumerate(grid):
            place = positions[..., axis].float()
            # 0..1 spans the image from edge to edge, or (published) from the first patch's centre to the last's.
            place = place * (side - 1) if c.span == "centres" else place * side - 0.5
            spot.append(place[..., None] - torch.arange(side, device=positions.device))  # [..., S, side]
        squared = spot[0].square()[..., :, None] + spot[1].square()[..., None, :]  # [..., S, H, W]
        weights = torch.exp(-squared / (2 * c.sigma**2))
        real = mask[..., None, None].to(weights.dtype)
        if c.normalise == "twice":  # published: padding counts in the first sum, and the rest is normalised again
            weights = weights / (weights.sum(-3, keepdim=True) + _EPS)
        weights = weights * real
        return weights / (weights.sum(-3, keepdim=True) + _EPS)

    def _tokens(self, grid: Grid) -> int:
        merge = self.config.merge
        if grid[0] % merge or grid[1] % merge or min(grid) < 1:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches does not divide into {merge} x {merge} groups")
        return grid[0] * grid[1] // merge**2

    def _to_tokens(self, field: Tensor, grid: Grid) -> Tensor:
        """Fields [b, H*W, 2C] over patches -> [b, n, 2C] over the merged tokens, row by row."""
        c = self.config
        count = self._tokens(grid)
        image = field.unflatten(1, grid).permute(0, 3, 1, 2)  # [b, 2C, H, W]
        if c.resize == "mean":
            return F.avg_pool2d(image, c.merge).flatten(2).transpose(1, 2)
        # Published: resized to the squarest grid of about as many cells, which only for square images is their own.
        rows = round(count**0.5)
        size = rows, max(1, -(-count // rows))
        cells = F.interpolate(image.contiguous(), size=size, mode="bilinear", align_corners=False)
        cells = cells.flatten(2).transpose(1, 2)
        if cells.shape[1] == count:
            return cells
        return cells[:, torch.linspace(0, cells.shape[1] - 1, count, device=field.device).round().long()]
