"""Weights of linear layers in eight bits: a whole number for each weight, and a float32 scale for each output.

    y = s (Q x) + b,  Q = round(W / s) in -127..127,  s = max |W| / 127 along each row of W

Inputs and results stay bfloat16, in which those whole numbers are exact: all that is lost is the rounding of W to
1/127 of its row's largest. What a layer holds is half of bfloat16; what it computes is no faster but for a few rows
on a CPU (see docs/PERFORMANCE.md). SFI, whose weights are read rather than called, the modulation, which computes in a
precision of its own, and the projection onto the vocabulary, which answers are read off, keep theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.fusion import SpatialIntegration
from model_server.model.half import InFloat32
from model_server.model.modulation import TokenModulation
from model_server.model.rsvlm import RSVLM

FEW_ROWS = 16  # up to so many PyTorch's own CPU kernel is the faster way
KERNEL_STEP = 32
TILE = 2**20  # weights that are widened at a time: they stay in a processor's caches
GPU_TILE = 2**24  # on a GPU, which smaller products would not fill


class Int8Linear(nn.Module):
    """A linear layer of these weights [out, in] and bias, rounded; it takes bfloat16 (or float32) and returns it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out]
        self.weight = _fixed((wide / scale[:, None]).round().to(torch.int8))
        self.scale = _fixed(scale)
        self.bias = None if bias is None else _fixed(bias.detach().clone())
        # Its float32 form, and that for CUDA, are plain loops, far behind widening and multiplying. It reads past the
        # end of rows that are no multiple of `KERNEL_STEP` long, without a word.
        self._has_kernel = weight.device.type == "cpu" and weight.shape[1] % KERNEL_STEP == 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self._product(rows) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, rows: Tensor) -> Tensor:
        """Q x for rows [R, in] -> [R, out]."""
        if self._has_kernel and rows.dtype == torch.bfloat16 and len(rows) <= FEW_ROWS:
            ones = torch.ones(len(self.weight), dtype=rows.dtype)  # it would want the scales in bfloat16
            return torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, ones)
        most = TILE if rows.device.type == "cpu" else GPU_TILE
        tiles = self.weight.split(max(most // self.weight.shape[1], 1))
        return torch.cat([F.linear(rows, tile.to(rows.dtype)) for tile in tiles], -1)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


@torch.no_grad()
def quantise(model: RSVLM) -> None:
    """Round the linear layers of the decoder and of what leads into it, in place; see `quantise_projections`."""
    kept = {model.backbone, model.sentence, model.heads}
    for name, part in list(model.named_children()):
        if part not in kept:
            _quantise_child(model, name, part)


@torch.no_grad()
def quantise_projections(within: nn.Module) -> None:
    """Round every linear layer below a module, in place, but for those that must stay as they are; the rounded ones can
    no longer be trained or saved."""
    for name, part in list(within.named_children()):
        _quantise_child(within, name, part)


def _quantise_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    if isinstance(child, nn.Linear):
        if name != "head":
            setattr(parent, name, Int8Linear(child.weight, child.bias))
    elif not isinstance(child, SpatialIntegration | TokenModulation | InFloat32):
        quantise_projections(child)
