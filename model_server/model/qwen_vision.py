"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): patches at native size, attention within windows, 2 x 2 merging.

Patches stay in the order in which they come, merge group by merge group along the rows; windows and images are gathered
for attention only. (The authors' code sorts all patches by window first and back at the end: the same sums.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import Runs, attend_packed, rotate
from model_server.model.config import QwenVisionConfig

Grid = tuple[int, int]  # rows and columns of patches
_ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Groups:
    """Patches that attend to each other: `order` int [N] puts them group by group, `back` int [N] as they were."""

    order: Tensor
    back: Tensor
    runs: Runs

    @classmethod
    def of(cls, groups: Sequence[Tensor], device: torch.device) -> Groups:
        order = torch.cat(list(groups))
        return cls(order.to(device), order.argsort().to(device), Runs.of([len(g) for g in groups], device))


class Block(nn.Module):
    """Pre-norm attention within groups, and a SwiGLU with biases."""

    def __init__(self, c: QwenVisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1 = nn.RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = nn.RMSNorm(c.width, c.norm_eps)
        self.gate = nn.Linear(c.width, c.ffn)
        self.up = nn.Linear(c.width, c.ffn)
        self.down = nn.Linear(c.ffn, c.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], groups: Groups) -> Tensor:
        """x [N, W] -> [N, W]; rope: cosine and sine [1, N, W / heads]."""
        n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, 3, self.heads, -1).permute(1, 2, 0, 3)  # each [heads, N, d]
        q, k = rotate(q[None], *rope)[0], rotate(k[None], *rope)[0]
        q, k, v = (y.transpose(0, 1)[groups.order] for y in (q, k, v))  # [N, heads, d], in the order of the groups
        y = attend_packed(q, k, v, groups.runs)[groups.back].reshape(n, w)
        x = x + self.out(y)
        z = self.norm2(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


class QwenVision(nn.Module):
    """Patches of images of any sizes to visual tokens of the decoder's width."""

    def __init__(self, c: QwenVisionConfig, width: int) -> None:
        """width: of the tokens that come out."""
        super().__init__()
        self.config = c
        merged = c.width * c.merge**2
        cell = (c.frames, c.patch, c.patch)
        # One step over whole patches, so a linear layer; as a convolution it also rounds as the authors' does.
        self.patches = nn.Conv3d(3, c.width, cell, cell, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.norm_eps)
        self.merger = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, width))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens [n, D] of packed images, each row by row.

        Args:
            patches: [N, 3 * frames * patch^2] normalised values, images one after the other.
            grids: rows and columns of patches of each image, multiples of `merge`.

        Raises:
            ValueError: the patches do not fit the grids.
        """
        c = self.config
        if any(side % c.merge for grid in grids for side in grid) or sum(h * w for h, w in grids) != len(patches):
            raise ValueError(f"{len(patches)} patches do not fit the grids {list(grids)} of {c.merge}x{c.merge} groups")
        rope = self._rope(grids, patches.device)
        own = window_groups(grids, c)
        windows = Groups.of(own, patches.device)
        # Window by window here too, as the authors' code has them: sums in another order round otherwise.
        images = Groups.of(torch.cat(own).split([h * w for h, w in grids]), patches.device)
        x = self.patches(patches.view(-1, 3, c.frames, c.patch, c.patch)).flatten(1)  # [N, W]
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, images if layer in c.full_layers else windows)
        return self.merger(self.norm(x).view(-1, c.merge**2 * c.width))

    def _rope(self, grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary table [1, N, d]: half of each head's d/2 frequencies turn by the row, the others by the column."""
        d = self.config.width // self.config.heads
        rates = 1.0 / _ROPE_BASE ** (torch.arange(0, d // 2, 2, device=device, dtype=torch.float32) / (d // 2))
        places = torch.cat([patch_places(grid, self.config.merge) for grid in grids]).to(device)  # [N, 2]
        angles = (places[:, :, None] * rates).flatten(1)[None]  # [1, N, d/2]
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Row and column of each patch, int [N, 2], in the order of patches: group by group, each row by row."""
    h, w = grid
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack((rows, columns), -1).view(h // merge, merge, w // merge, merge, 2)
    return places.transpose(1, 2).reshape(-1, 2)


def window_groups(grids: Sequence[Grid], c: QwenVisionConfig) -> list[Tensor]:
    """Indices of the patches in each window, images one after the other, windows row by row."""
    side = c.window // c.patch // c.merge * c.merge  # patches of a window, whole merge groups
    groups, start = [], 0
    for grid in grids:
        at = patch_places(grid, c.merge) // side
        window = at[:, 0] * -(-grid[1] // side) + at[:, 1]
        groups += [start + (window == n).nonzero()[:, 0] for n in range(int(window.max()) + 1)]
        start += len(window)
    return groups
