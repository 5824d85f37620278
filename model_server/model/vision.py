"""The multi-scale encoder: one convolutional pass gives maps at strides 4, 8, 16 and 32.

EfficientNet-Lite (Tan & Le 2019, the Lite variant: no squeeze-and-excite, ReLU6), laid out so that the early
blocks can be frozen and their output kept while the late ones train.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import BackboneConfig


def square(image: np.ndarray, side: int) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, side, side]; bilinear with antialiasing, the same at training and serving."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return x[0].contiguous()


FINE = 8  # the coarsest stride of what counts as large maps


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: output side = ceil(input side / stride).

    The odd pixel of padding goes to the right and bottom, as the published weights were trained.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        k, s = self.kernel_size[0], self.stride[0]
        if k == 1:
            return super().forward(x)
        if s == 1:
            return F.conv2d(x, self.weight, self.bias, 1, k // 2, 1, self.groups)
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:]]
        top, left = pads[0] // 2, pads[1] // 2
        x = F.pad(x, (left, pads[1] - left, top, pads[0] - top))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class ConvNorm(nn.Module):
    """Convolution without bias and its batch norm; `fold` turns the pair into one convolution with a bias."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, momentum: float = 0.01
    ) -> None:
        super().__init__()
        self.conv = SameConv(c_in, c_out, kernel, stride, groups=groups, bias=False)
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(c_out, eps=1e-3, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.norm is None else self.norm(y)

    @torch.no_grad()
    def fold(self) -> None:
        """The same function in one pass; only right once the norm's statistics no longer change."""
        norm = self.norm
        if norm is None or norm.running_mean is None or norm.running_var is None:
            return
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        self.conv.weight.mul_(scale[:, None, None, None])
        self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        self.norm = None


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1; a residual where the shape stays."""

    def __init__(
        self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int, momentum: float = 0.01
    ) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = ConvNorm(c_in, hidden, momentum=momentum) if expansion != 1 else None
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden, momentum=momentum)
        self.project = ConvNorm(hidden, c_out, momentum=momentum)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C_out, H/stride, W/stride]
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class Backbone(nn.Module):
    """Pixels to a pyramid of maps and one pooled vector.

    `strides[i]` is the stride of block i's output; a scale's map is the output of its last block.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(3, config.stem, 3, 2, momentum=config.norm_momentum)
        blocks, strides, c_in, stride = [], [], config.stem, 2
        for expansion, kernel, step, width in config.blocks:
            blocks.append(InvertedResidual(c_in, width, expansion, kernel, step, config.norm_momentum))
            stride *= step
            c_in = width
            strides.append(stride)
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(c_in, config.head, momentum=config.norm_momentum)
        self.strides = tuple(strides)
        last = {s: i for i, s in enumerate(strides)}
        self.taps = {i: s for s, i in last.items() if s >= 4}  # block index -> stride
        self.widths = {s: config.blocks[i][3] for i, s in self.taps.items()}  # stride -> channels
        self.together: int | None = None  # pixels that go through the blocks of large maps at a time; None = all

    def normalise(self, images: Tensor) -> Tensor:  # uint8 [B, 3, H, W] -> float [B, 3, H, W]
        return (images.float() - self.config.input_mean) / self.config.input_std

    def early(self, x: Tensor, until: int) -> Tensor:
        """The stem and blocks 0 .. until-1, of normalised pixels."""
        x = F.relu6(self.stem(x))
        for block in self.blocks[:until]:
            x = block(x)
        return x

    def late(self, x: Tensor, since: int) -> tuple[dict[int, Tensor], Tensor]:
        """Blocks since .. end on the output of `early`; maps of the strides tapped there, and the pooled head."""
        maps = {}
        for i in range(since, len(self.blocks)):
            x = self.blocks[i](x)
            if i in self.taps:
                maps[self.taps[i]] = x  # [B, C_s, H/s, W/s]
        pooled = F.relu6(self.head(x)).mean((2, 3))  # [B, head]
        return maps, pooled

    def first_maps(self, images: Tensor, until: int) -> dict[int, Tensor]:
        """uint8 [B, 3, H, W] -> maps of the strides from 4 that end within blocks 0 .. until-1, and that of the last of
        these; `together` pixels at a time where it is set."""
        pixels = images.shape[-2] * images.shape[-1]
        size = len(images) if self.together is None else max(self.together // pixels, 1)
        parts = [self._first_maps(part, until) for part in images.split(max(size, 1))]
        return parts[0] if len(parts) == 1 else {s: torch.cat([part[s] for part in parts]) for s in parts[0]}

    def _first_maps(self, images: Tensor, until: int) -> dict[int, Tensor]:
        x = self.normalise(images).to(next(self.parameters()).dtype).to(memory_format=torch.channels_last)
        x, maps = F.relu6(self.stem(x)), {}
        for block, stride in zip(self.blocks[:until], self.strides, strict=False):
            x = block(x)
            if stride >= 4:
                maps[stride] = x  # [B, C_s, H/s, W/s]
        return maps

    def forward(self, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """uint8 [B, 3, H, W] -> {stride: [B, C_s, H/s, W/s]} at strides 4, 8, 16, 32, and pooled [B, head]."""
        fine = sum(stride <= FINE for stride in self.strides)
        maps = self.first_maps(images, fine)
        more, pooled = self.late(maps[max(maps)], fine)
        return maps | more, pooled

    def fold_norms(self) -> Self:
        """Fold every batch norm into its convolution, in place."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self

    def channels_last(self) -> Self:
        """Lay the weights out as the convolutions read them fastest on a CPU."""
        return self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in the stubs)
