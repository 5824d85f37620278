"""Detail stacks of a convolutional pyramid: what recurrent injection looks at again in the embedded architecture.

FUSE-RSVLM cuts a large canvas into overlapping windows, since its tower takes one size, and stitches them (windows.py).
A convolution takes the canvas whole. Its maps are averaged onto `factor` times the grid of the visual tokens, a side,
and split by their phases, so that token i of each stack covers what visual token i covers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import StacksConfig


def canvas_of(images: Tensor, factor: int) -> Tensor:
    """uint8 [B, 3, S, S] -> float 0..255 [B, 3, factor S, factor S], bilinear."""
    return F.interpolate(images.float(), scale_factor=factor, mode="bilinear", align_corners=False)


class DetailStacks(nn.Module):
    """Maps of the canvas -> stacks, by stride, row phase and column phase."""

    def __init__(self, config: StacksConfig, widths: Mapping[int, int], grid: int, width: int) -> None:
        """widths: stride -> channels; grid: visual tokens a side; width: of the decoder."""
        super().__init__()
        self.side, self.factor = grid * config.factor, config.factor
        self.project = nn.ModuleDict(
            {str(s): nn.Sequential(nn.LayerNorm(widths[s]), nn.Linear(widths[s], width)) for s in config.strides}
        )

    def forward(self, maps: Mapping[int, Tensor]) -> Tensor:
        """{stride: [B, C_s, H_s, W_s]} -> [B, K, L*L, D], K = strides * factor^2."""
        stacks = []
        for s, project in self.project.items():
            x = F.adaptive_avg_pool2d(maps[int(s)].to(next(project.parameters()).dtype), self.side)
            x = project(x.permute(0, 2, 3, 1))  # [B, f L, f L, D]
            phases = range(self.factor)
            stacks += [x[:, r :: self.factor, c :: self.factor].flatten(1, 2) for r in phases for c in phases]
        return torch.stack(stacks, 1)
