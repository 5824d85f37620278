"""Half precision for serving: bfloat16 where a network is large, float32 where answers are read off it.

The image heads, the projection onto the vocabulary, boxes and change keep float32 weights, so that logits, scores and
distances are not rounded to bfloat16's three digits. So does the sentence encoder: what it says of a phrase is compared
with thresholds, and a text passes it once. So do the stem and the first block of the backbone: they have few weights,
and their rounding would be most of what masks lose.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from model_server.model.dense import DenseBranch
from model_server.model.rsvlm import RSVLM
from model_server.model.vision import ConvNorm


class InFloat32(nn.Module):
    """A layer with float32 weights among layers of half precision; `then`: what the next one takes, None = float32."""

    def __init__(self, layer: nn.Module, then: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.float())
        return y if self.then is None else y.to(self.then)


@torch.no_grad()
def halve(model: RSVLM) -> None:
    """Bring a float32 model to bfloat16, in place. It can no longer be trained or saved."""
    backbone, decoder = model.backbone, model.decoder
    if decoder.head is None:
        words, width = decoder.embed.weight.shape
        decoder.head = nn.Linear(width, words, bias=False, device="meta")
        decoder.head.weight = nn.Parameter(decoder.embed.weight.detach(), requires_grad=False)
    first = backbone.blocks[0]
    _narrow(model, {model.heads, model.sentence, backbone.stem, first, backbone.head, decoder.head})
    backbone.stem = cast("ConvNorm", InFloat32(backbone.stem))  # all four are only ever called
    backbone.blocks[0] = InFloat32(first, torch.bfloat16)
    backbone.head = cast("ConvNorm", InFloat32(backbone.head))
    decoder.head = cast("nn.Linear", InFloat32(decoder.head))


@torch.no_grad()
def halve_dense(branch: DenseBranch) -> None:
    """The same of a dense branch."""
    change = branch.change_head.out
    _narrow(branch, {branch.heat_phrases, branch.mask_phrases, branch.box_out, change[-1]})
    branch.box_out = cast("nn.Conv2d", InFloat32(branch.box_out))  # which is only ever called
    change[-1] = InFloat32(change[-1])


def _narrow(module: nn.Module, wide: Collection[nn.Module]) -> None:
    """To bfloat16, but for the modules of `wide`."""
    if module in wide:
        return
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.bfloat16()
    for child in module.children():
        _narrow(child, wide)
