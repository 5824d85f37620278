"""Convolutions and projections as oneDNN runs them fastest: weights laid out once, ReLU6 and residual fused in.

A plain convolution brings its weights into the kernel's own layout at every call, and writes and reads its output once
more for ReLU6 and once more for the residual. Both are done here when the model is loaded, or inside the kernel. A
plain projection goes to the BLAS that PyTorch was built with, which on some processors (MKL on AMD) has half of
oneDNN's rate. The function is the same up to rounding; the result can neither be trained nor saved.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.decoder import Decoder
from model_server.model.half import InFloat32
from model_server.model.vision import ConvNorm, InvertedResidual

_HINT = 64  # height and width that layouts are chosen for; other sizes work too
_ROWS = 64  # as many rows that layouts of projections are chosen for


def can_pack(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has the fused kernels, and for this device and precision."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PackedConv(nn.Module):
    """A folded `ConvNorm`, with ReLU6 behind it where `relu6`, or a tensor added to it."""

    def __init__(self, layer: ConvNorm, relu6: bool) -> None:
        super().__init__()
        conv = layer.conv
        if layer.norm is not None or conv.bias is None:
            raise ValueError("only a folded convolution can be packed; call `fold_norms` first")
        self.stride, self.groups = conv.stride[0], conv.groups
        self.padding = [conv.kernel_size[0] // 2] * 2
        weight = conv.weight.detach()
        if self.stride != 1:
            # TensorFlow's SAME (see `SameConv`) pads even sides by one less at the top and left. A kernel with zeros
            # there gives the same under equal padding, and no padded copy of the map is made.
            weight = F.pad(weight, (1, 0, 1, 0))
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(memory_format=torch.channels_last),
            self.padding, [self.stride] * 2, [1, 1], self.groups, [1, conv.in_channels, _HINT, _HINT],
        )  # fmt: skip
        self.bias = conv.bias.detach()
        self.after, self.limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """As the layer; `add` is of the output's shape."""
        if self.stride != 1 and (x.shape[-2] % 2 or x.shape[-1] % 2):  # odd sides are padded alike on both
            x = F.pad(x, (x.shape[-1] % 2, 0, x.shape[-2] % 2, 0))
        where = (self.weight, self.bias, self.padding, [self.stride] * 2, [1, 1], self.groups)
        if add is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *where, self.after, self.limits, "")
        return torch.ops.mkldnn._convolution_pointwise.binary(x, add, *where, "add", None, None, [], None)


class PackedResidual(nn.Module):
    """What an `InvertedResidual` computes."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.expand = None if block.expand is None else PackedConv(block.expand, relu6=True)
        self.depthwise = PackedConv(block.depthwise, relu6=True)
        self.project = PackedConv(block.project, relu6=False)
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        return self.project(y, x) if self.residual else self.project(y)


class PackedLinear(nn.Module):
    """A linear layer of these weights [out, in], which takes inputs of their precision."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), _ROWS)
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def pack_decoder(decoder: Decoder) -> None:
    """Pack the projections of its blocks, and the one onto the vocabulary, in place."""
    pack_projections(decoder.blocks)
    if isinstance(decoder.head, InFloat32):
        pack_projections(decoder.head)
        return
    head = PackedLinear(decoder.embed.weight if decoder.head is None else decoder.head.weight)
    decoder.head = cast("nn.Linear", head)  # which is only ever called


@torch.no_grad()
def pack_projections(within: nn.Module) -> None:
    """Replace every linear layer below a module by a packed one, in place; their weights are not to be asked for."""
    for name, layer in within.named_children():
        if isinstance(layer, nn.Linear):
            setattr(within, name, PackedLinear(layer.weight, layer.bias))
        else:
            pack_projections(layer)


@torch.no_grad()
def pack(blocks: nn.ModuleList) -> None:
    """Replace every `InvertedResidual` of a list, whose norms are folded, in place."""
    for i, block in enumerate(blocks):
        if isinstance(block, InvertedResidual):
            blocks[i] = PackedResidual(block)
