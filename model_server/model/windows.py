"""The detail view (FUSE-RSVLM): overlapping windows of a large canvas through the tower at several scales, tapped at
several layers, stitched by a Hann-weighted mean into one grid and split by its phases into stacks.

With the published sizes (canvas 672, windows of 336 and 168 pixels at half their side, three taps, phases 2x2) these
are 9 + 49 windows and 2 * 3 * 4 = 24 stacks of 24 x 24 tokens, stack j matching the global view's tokens in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.config import DetailConfig, ViTConfig
from model_server.model.vit import VisionTransformer

PER_PASS = 32  # windows: enough to fill a GPU, few enough to bound memory however many images come


class WindowsDoNotFit(ValueError):
    """The tower's patches and the window scales do not give every scale the same grid of tokens."""


@dataclass(frozen=True)
class Scale:
    """One window scale: sides and steps in pixels and tokens; `count` windows a side give `grid` tokens a side."""

    window: int
    step: int
    tokens: int
    token_step: int
    count: int
    pool: int

    @property
    def grid(self) -> int:
        return (self.count - 1) * self.token_step + self.tokens


def plan(config: DetailConfig, vision: ViTConfig) -> tuple[Scale, ...]:
    """The scales for a tower. A window's tokens are snapped to a divisor of the base window's, so that they pool.

    Raises:
        WindowsDoNotFit: the scales' grids differ, or do not split into stacks as large as the global view.
    """
    base = config.window // vision.patch
    divisors = [d for d in range(1, base + 1) if base % d == 0]
    scales = []
    for scale in config.scales:
        wanted = max(1, round(base * scale))
        tokens = min(divisors, key=lambda d: (abs(d - wanted), d))
        window, token_step = tokens * vision.patch, max(1, tokens // 2)
        step = token_step * vision.patch
        count = 1 + max(0, config.canvas - window) // step
        scales.append(Scale(window, step, tokens, token_step, count, base // tokens))
    grids = [s.grid for s in scales]
    if any(g != base * config.factor for g in grids):
        raise WindowsDoNotFit(
            f"windows at scales {config.scales} of a tower with patches of {vision.patch} pixels give grids of {grids} "
            f"tokens a side; all must be {base * config.factor} = {config.factor} x {base}"
        )
    return tuple(scales)


def canvas_of(images: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, side, side], bilinear; what is not square is squashed."""
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def global_view(images: Tensor, config: DetailConfig) -> Tensor:
    """[B, 3, H, W] -> [B, 3, window, window]: squashed, or padded to a square with `pad_mean`."""
    if config.pad_mean is None:
        return canvas_of(images, config.window)
    side, (h, w) = config.window, images.shape[-2:]
    scale = min(side / h, side / w)
    inner = max(round(h * scale), 1), max(round(w * scale), 1)
    out = images.new_tensor(config.pad_mean).view(1, 3, 1, 1).repeat(images.shape[0], 1, side, side)
    top, left = (side - inner[0]) // 2, (side - inner[1]) // 2
    resized = F.interpolate(images, inner, mode="bilinear", align_corners=False)
    out[:, :, top : top + inner[0], left : left + inner[1]] = resized
    return out


def cut_windows(canvas: Tensor, scale: Scale, config: DetailConfig) -> Tensor:
    """[B, 3, S, S] -> [B * n * n, 3, window, window], window (r, c) of an image at r * n + c, as large as the base."""
    cut = canvas.unfold(2, scale.window, scale.step).unfold(3, scale.window, scale.step)  # [B, 3, n, n, w, w]
    if not config.plane_windows:
        cut = cut.permute(0, 2, 3, 1, 4, 5)
    windows = cut.reshape(-1, 3, scale.window, scale.window)
    return windows if scale.window == config.window else canvas_of(windows, config.window)


def stitch(tokens: Tensor, scale: Scale, batch: int, zero_edges: bool) -> Tensor:
    """Tokens of all windows [B * n * n, N, W] -> one grid [B, g, g, W]: where windows overlap, their weighted mean."""
    n, t, width = scale.count, scale.tokens, tokens.shape[-1]
    side = t * scale.pool
    x = tokens.transpose(1, 2).reshape(-1, width, side, side)
    x = F.avg_pool2d(x, scale.pool).view(batch, n, n, width, t, t)
    hann = torch.hann_window(t if zero_edges else t + 2, periodic=False, device=x.device, dtype=x.dtype)
    hann = hann if zero_edges else hann[1:-1]
    weight = torch.outer(hann, hann)
    total = x.new_zeros(batch, width, scale.grid, scale.grid)
    weights = x.new_zeros(scale.grid, scale.grid)
    for row in range(n):
        for column in range(n):
            top, left = row * scale.token_step, column * scale.token_step
            total[:, :, top : top + t, left : left + t] += x[:, row, column] * weight
            weights[top : top + t, left : left + t] += weight
    return (total / weights.clamp(min=1e-6)).permute(0, 2, 3, 1)


def detail_stacks(tower: VisionTransformer, canvas: Tensor, config: DetailConfig) -> Tensor:
    """Normalised canvases [B, 3, S, S] -> stacks [B, K, V, W], ordered by scale, tap, row phase and column phase.

    All windows of all images and scales make one batch, which passes the tower `PER_PASS` windows at a time.
    """
    scales = plan(config, tower.config)
    windows = [cut_windows(canvas, s, config) for s in scales]
    passes = [tower(part, config.taps) for part in torch.cat(windows).split(PER_PASS)]
    sizes = [len(w) for w in windows]
    states = [torch.cat([found[tap] for found in passes]).split(sizes) for tap in config.taps]
    by_scale = zip(*states, strict=True)  # scale -> a tensor per tap
    phases = range(config.factor)
    stacks = []
    for scale, tapped in zip(scales, by_scale, strict=True):
        for tokens in tapped:
            grid = stitch(tokens, scale, len(canvas), config.zero_edges)
            stacks += [grid[:, r :: config.factor, c :: config.factor].flatten(1, 2) for r in phases for c in phases]
    return torch.stack(stacks, 1)
