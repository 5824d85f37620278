"""What our modules compute in one product, in the several products of the authors' code.

Queries, keys and values come of one multiplication here and of three there; a LoRA is part of its matrix here and a
path beside it there. The sums are the same, but a product of another shape is rounded otherwise, and random weights
blow that up to half the tolerance. It is undone for the comparison alone: the one product is held to references in the
tests, and merged matrices to base and LoRA here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.checkpoints.adapters.fusar import LowRank
from model_server.checkpoints.files import Tensors
from model_server.checkpoints.published import Plan
from model_server.model.decoder import Block
from model_server.model.vit import ViTLayer


class Part(nn.Module):
    """Some rows of a linear layer: x -> W x + b, and a LoRA beside it, + scale B (A x)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, added: LowRank | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.added = weight, bias, added
        self.down, self.up = (None, None) if added is None else (added.down(), added.up())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.added is None or self.down is None or self.up is None:
            return y
        return y + F.linear(F.linear(x, self.down), self.up) * self.added.scale


class Apart(nn.Module):
    """A linear layer by parts, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def projections_apart(model: nn.Module) -> None:
    """Change a loaded model in place: its decoder's blocks and its tower's layers, where they are not apart yet."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), Apart):
            continue
        if isinstance(module, Block):
            width, kv = module.heads * module.head_width, module.kv_heads * module.head_width
            module.register_module("qkv", _apart(module.qkv, [width, kv, kv]))
        elif isinstance(module, ViTLayer):
            module.register_module("qkv", _apart(module.qkv, [module.qkv.in_features] * 3))


def _apart(linear: nn.Linear, sizes: Sequence[int]) -> Apart:
    weights = linear.weight.split(list(sizes))
    biases = [None] * len(weights) if linear.bias is None else linear.bias.split(list(sizes))
    return Apart([Part(weight, bias) for weight, bias in zip(weights, biases, strict=True)])


def low_ranks_apart(
    model: nn.Module, plan: Plan, base: Tensors, added: Mapping[str, LowRank]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Change a loaded model in place: linear layers with a LoRA merged into them, their parts too.

    Returns:
        By published name, each merged matrix as the model had it, and as base and LoRA give it in double precision.
    """
    layers: dict[str, list[tuple[int, str]]] = {}  # our linear layer -> first row and published name of its parts
    for name, pieces in plan.items():
        path, _, leaf = pieces[0].ours.rpartition(".")
        if leaf == "weight":
            layers.setdefault(path, []).append((pieces[0].start or 0, name))
    found = {}
    for path, parts in layers.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear) or not any(name in added for _, name in parts):
            continue
        made = []
        for start, name in sorted(parts):
            weight, low = base[name]().float(), added.get(name)
            rows = slice(start, start + len(weight))
            if low is not None:
                wanted = weight.double() + low.scale * (low.up().double() @ low.down().double())
                found[name] = linear.weight[rows].clone(), wanted
            made.append(Part(weight, None if linear.bias is None else linear.bias[rows], low))
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent).register_module(leaf, Apart(made))
    return found
