"""Attention through one function, rotary positions, and the key/value cache.

`math` is the plain float32 reference; `sdpa` is PyTorch's fused kernel. Masks are boolean, True = may look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F


class Backend(StrEnum):
    SDPA = "sdpa"
    MATH = "math"


_current: ContextVar[Backend] = ContextVar("attention_backend", default=Backend.SDPA)


@contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """Use a backend for all attention within, where none is named."""
    before = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(before)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: Backend | None = None,
           scale: float | None = None) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v, or softmax(scale * q k^T) v.

    q [B, H, T, d]; k, v [B, G, S, d] with H a multiple of G (grouped heads); mask bool, broadcastable to
    [B, H, T, S]. Returns [B, H, T, d] in q's dtype.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if (backend or _current.get()) is Backend.SDPA:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q.float() @ k.float().transpose(-1, -2)  # [B, H, T, S]
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def rotary_table(positions: Tensor, width: int, base: float,
                 sections: Sequence[int] = ()) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosine and sine [B, T, width] of integer positions, the two halves alike (RoPE, Su et al. 2021).

    positions [B, T], or [3, B, T] = (time, row, column) with `sections` (M-RoPE, Qwen2-VL): of the width/2
    frequencies the first sections[0] turn by time, the next sections[1] by row, the rest by column.
    """
    rates = 1.0 / base ** (torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * rates  # [B, T, width/2], or [3, B, T, width/2]
    if positions.ndim == 3:
        if len(sections) != 3 or sum(sections) != width // 2:
            raise ValueError(
                f"positions in three parts need three rope_sections that add up to {width // 2}, not {tuple(sections)}"
            )
        angles = torch.cat([part[i] for i, part in enumerate(angles.split(list(sections), -1))], -1)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, d] by the table [B, T, d]; halves are paired as in Llama."""
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class KVCache:
    """Keys and values of B sequences with room for `length` positions each.

    Slots are static: writing at a position never moves anything. `rows` selects sequences when beams are reordered.
    """

    def __init__(self, layers: int, batch: int, heads: int, length: int, width: int, like: Tensor) -> None:
        shape = (layers, 2, batch, heads, length, width)
        self.data = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.filled = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions (k, v [B, G, T, d]) of one layer; returns all that is filled, [B, G, S, d] each."""
        end = self.filled + k.shape[2]
        self.data[layer, 0, :, :, self.filled : end] = k
        self.data[layer, 1, :, :, self.filled : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has written."""
        self.filled += positions

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` [B'], in that order; repeats are allowed."""
        self.data = self.data[:, :, rows]
