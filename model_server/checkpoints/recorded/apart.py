"""Queries, keys and values by three multiplications instead of one, as the authors' code makes them.

The sums are the same, but a product of another shape is rounded otherwise, and random weights blow that up to half
the tolerance. It is undone for the comparison alone; the one product is held to references in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.decoder import Block
from model_server.model.vit import ViTLayer


class Apart(nn.Module):
    """A linear layer by parts, so many of its rows at a time."""

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear.weight.split(self.sizes)
        biases = [None] * len(weights) if self.linear.bias is None else self.linear.bias.split(self.sizes)
        return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


def projections_apart(model: nn.Module) -> None:
    """Change a loaded model in place: its decoder's blocks and its tower's layers."""
    for module in model.modules():
        if isinstance(module, Block):
            width, kv = module.heads * module.head_width, module.kv_heads * module.head_width
            module.register_module("qkv", Apart(module.qkv, [width, kv, kv]))
        elif isinstance(module, ViTLayer):
            module.register_module("qkv", Apart(module.qkv, [module.qkv.in_features] * 3))
