"""The encoder and the dense branch as oneDNN runs them fastest: weights laid out once, ReLU6 and residual fused in.

A plain convolution brings its weights into the kernel's own layout at every call, and writes and reads its output once
more for ReLU6 and once more for the residual. Both are done here when the model is loaded, or inside the kernel. A 1x1
convolution is a projection of each pixel, and run as one: its call costs half as much, and its layout suits maps of any
size. Maps of the first blocks are large; images go through these few at a time, so that a map is still in the
processor's caches when it is read. The function is the same up to rounding; the result can neither be trained nor
saved.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.dense import DenseBranch
from model_server.model.half import InFloat32
from model_server.model.vision import Backbone, ConvNorm, InvertedResidual

TOGETHER = 2**17  # pixels at a time in the blocks of large maps: two images of 256 x 256
_HINT = 64  # height and width that layouts are chosen for; other sizes work too
_PIXELS = 1024  # as many pixels that layouts of projections are chosen for


class PackedDepthwise(nn.Module):
    """A folded depthwise `ConvNorm` and ReLU6 behind it."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.conv
        weight, self.bias = folded(layer)
        self.stride, self.groups = conv.stride[0], conv.groups
        self.padding = [conv.kernel_size[0] // 2] * 2
        if self.stride != 1:
            # TensorFlow's SAME (see `SameConv`) pads even sides by one less at the top and left. A kernel with zeros
            # there gives the same under equal padding, and no padded copy of the map is made.
            weight = F.pad(weight, (1, 0, 1, 0))
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(memory_format=torch.channels_last),
            self.padding, [self.stride] * 2, [1, 1], self.groups, [1, conv.in_channels, _HINT, _HINT],
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1 and (x.shape[-2] % 2 or x.shape[-1] % 2):  # odd sides are padded alike on both
            x = F.pad(x, (x.shape[-1] % 2, 0, x.shape[-2] % 2, 0))
        where = (self.weight, self.bias, self.padding, [self.stride] * 2, [1, 1], self.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, *where, "hardtanh", [0.0, 6.0], "")


class PackedPointwise(nn.Module):
    """A 1x1 convolution of these weights [out, in, 1, 1], with ReLU6 behind it where `relu6`, or a map added to it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, relu6: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1).clone(), _PIXELS)
        self.bias = None if bias is None else bias.detach().clone()
        self.after, self.limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W], channels last; `add` is of the output's shape."""
        where = (self.weight, self.bias)
        if add is None:
            y = torch.ops.mkldnn._linear_pointwise(x.permute(0, 2, 3, 1), *where, self.after, self.limits, "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x.permute(0, 2, 3, 1), add.permute(0, 2, 3, 1), *where, "add")
        return y.permute(0, 3, 1, 2)


class PackedResidual(nn.Module):
    """What an `InvertedResidual` computes."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.expand = None if block.expand is None else PackedPointwise(*folded(block.expand), relu6=True)
        self.depthwise = PackedDepthwise(block.depthwise)
        self.project = PackedPointwise(*folded(block.project))
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        return self.project(y, x) if self.residual else self.project(y)


def folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Its weight and bias. Raises ValueError where its norm is not folded into them."""
    if layer.norm is not None or layer.conv.bias is None:
        raise ValueError("only a folded convolution can be packed; call `fold_norms` first")
    return layer.conv.weight.detach(), layer.conv.bias.detach()


@torch.no_grad()
def pack_backbone(backbone: Backbone) -> None:
    """Pack its blocks and its head, in place; norms are folded."""
    pack_blocks(backbone.blocks)
    backbone.together = TOGETHER
    if isinstance(backbone.head, InFloat32):
        backbone.head.layer = PackedPointwise(*folded(cast("ConvNorm", backbone.head.layer)))
    else:
        backbone.head = cast("ConvNorm", PackedPointwise(*folded(backbone.head)))  # which is only ever called


@torch.no_grad()
def pack_dense(branch: DenseBranch) -> None:
    """Pack its blocks and all its 1x1 convolutions, in place."""
    pack_blocks(branch.blocks)
    pack_pointwise(branch)


@torch.no_grad()
def pack_pointwise(within: nn.Module) -> None:
    """Replace every plain 1x1 convolution below a module, in place."""
    for name, layer in within.named_children():
        if isinstance(layer, nn.Conv2d) and (*layer.kernel_size, *layer.stride, layer.groups) == (1, 1, 1, 1, 1):
            setattr(within, name, PackedPointwise(layer.weight, layer.bias))
        else:
            pack_pointwise(layer)


@torch.no_grad()
def pack_blocks(blocks: nn.ModuleList) -> None:
    """Replace every `InvertedResidual` of a list, whose norms are folded, in place."""
    for i, block in enumerate(blocks):
        if isinstance(block, InvertedResidual):
            blocks[i] = PackedResidual(block)
        elif isinstance(block, InFloat32) and isinstance(block.layer, InvertedResidual):
            block.layer = PackedResidual(block.layer)
