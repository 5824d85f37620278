"""Vision transformers of the CLIP and SigLIP kind, with tapped hidden states.

Equal to the encoders that both papers published through `transformers`; pixels come normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import attend
from model_server.model.config import ViTConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class ViTLayer(nn.Module):
    """Pre-norm attention and a two-layer perceptron, with biases."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        w, self.heads = config.width, config.heads
        self.norm1, self.norm2 = nn.LayerNorm(w, config.norm_eps), nn.LayerNorm(w, config.norm_eps)
        self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.up, self.down = nn.Linear(w, config.ffn), nn.Linear(config.ffn, w)
        self.act = ACTIVATIONS[config.act]

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        y = attend(q, k, v, None, scale=(w // self.heads) ** -0.5)  # a factor, as the published towers round it
        x = x + self.out(y.transpose(1, 2).reshape(b, n, w))
        return x + self.down(self.act(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Pixels to hidden states of the patches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        clip = config.style == "clip"
        self.side = config.image_size // config.patch  # tokens a side; a remainder of pixels is not looked at
        self.patches = nn.Conv2d(3, config.width, config.patch, config.patch, bias=not clip)
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02) if clip else None
        self.places = nn.Parameter(torch.randn(self.side**2 + clip, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width, config.norm_eps) if clip else None
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.layers))

    def forward(self, images: Tensor, taps: Collection[int]) -> dict[int, Tensor]:
        """float [B, 3, S, S] of the config's size -> {tap: [B, side*side, W]}, class token left out.

        Tap 0 is what the first layer sees, tap n the output of the n-th layer. Layers after the last tap do not run.

        Raises:
            ValueError: the images have another size.
        """
        if images.shape[-2:] != (self.config.image_size,) * 2:
            raise ValueError(
                f"this tower takes {self.config.image_size}x{self.config.image_size} pixels, not "
                f"{images.shape[-2]}x{images.shape[-1]}; resize the image first"
            )
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, side*side, W]
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), 1)
        x = x + self.places
        if self.norm is not None:
            x = self.norm(x)
        first = 0 if self.class_token is None else 1
        found = {0: x[:, first:]} if 0 in taps else {}
        for i, layer in enumerate(self.layers[: max(taps)], start=1):
            x = layer(x)
            if i in taps:
                found[i] = x[:, first:]
        return found
