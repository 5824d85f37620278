"""Projections as oneDNN runs them fastest: weights laid out once. Of the encoder see packed_vision.

A plain projection goes to the BLAS that PyTorch was built with, which on some processors (MKL on AMD) has half of
oneDNN's rate. The function is the same up to rounding; the result can neither be trained nor saved.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model_server.model.decoder import Decoder
from model_server.model.half import InFloat32

_ROWS = 64  # as many rows that layouts are chosen for; other numbers work too


def can_pack(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has the fused kernels, and for this device and precision."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


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
