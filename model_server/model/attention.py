"""Attention through one function, in a padded and in a packed form; rotary positions; and the key/value cache.

Backends are named in backends.py; `math`, the plain float32 equation, is what the others are held to. A mask is
boolean, True = may look, or "causal": a query looks at keys up to its own place, the last query at the last key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.backends import PACKAGES, Backend, Call, choose, flash, flash_packed

Mask = Tensor | Literal["causal"] | None

_current: ContextVar[Backend] = ContextVar("attention_backend", default=Backend.AUTO)


@contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """Use a backend for all attention within, where none is named."""
    before = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(before)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: Backend | None = None,
           scale: float | None = None) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v, or softmax(scale * q k^T) v.

    q [B, H, T, d]; k, v [B, G, S, d] with H a multiple of G (grouped heads); a bool mask is broadcastable to
    [B, H, T, S]. Returns [B, H, T, d] in q's dtype.

    Raises:
        UnsupportedAttention: the backend was asked for by name and cannot do it; the message says why.
    """
    kind = "none" if mask is None else "tensor" if isinstance(mask, Tensor) else "causal"
    chosen = choose(backend or _current.get(), Call.of(q, kind))
    if chosen in PACKAGES:
        return flash(chosen, q, k, v, kind == "causal", scale)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    t, s = q.shape[2], k.shape[2]
    if chosen is Backend.SDPA:
        square = kind == "causal" and t == s  # PyTorch aligns its own causal mask at the start
        allowed = None if square else _tensor(mask, t, s, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=square, scale=scale)
    scores = q.float() @ k.float().transpose(-1, -2)  # [B, H, T, S]
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    allowed = _tensor(mask, t, s, q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def _tensor(mask: Mask, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """A mask as a tensor, bool [T, S] for "causal"."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@dataclass(frozen=True)
class Runs:
    """Sequences packed one after the other: how long each is, here and (as sums, int32 [R + 1]) on the device."""

    lengths: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Runs:
        sums = list(accumulate(lengths, initial=0))
        return cls(tuple(lengths), torch.tensor(sums, dtype=torch.int32, device=device))


def attend_packed(q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs | None = None, causal: bool = False,
                  backend: Backend | None = None, scale: float | None = None) -> Tensor:  # fmt: skip
    """As `attend`, of sequences of any lengths packed without padding: each run sees itself (or its run of keys) only.

    q [N, H, d]; k, v [M, G, d]. Returns [N, H, d]. Without a flash package, runs of one length go together.

    Raises:
        UnsupportedAttention: the backend was asked for by name and cannot do it; the message says why.
        ValueError: the runs are not as long as the tensors, or not as many for keys as for queries.
    """
    keys = keys or queries
    if len(keys.lengths) != len(queries.lengths) or sum(queries.lengths) != len(q) or sum(keys.lengths) != len(k):
        raise ValueError(
            f"{len(q)} queries in {len(queries.lengths)} runs of {sum(queries.lengths)} and {len(k)} keys in "
            f"{len(keys.lengths)} runs of {sum(keys.lengths)} do not fit together"
        )
    chosen = choose(backend or _current.get(), Call.of(q, "causal" if causal else "none"))
    if chosen in PACKAGES:
        longest = max(queries.lengths, default=0), max(keys.lengths, default=0)
        return flash_packed(chosen, q, k, v, (queries.bounds, keys.bounds), longest, causal, scale)
    starts = [list(accumulate(runs.lengths, initial=0)) for runs in (queries, keys)]
    done, places = [], []
    for t, s in dict.fromkeys(zip(queries.lengths, keys.lengths, strict=True)):
        own = [i for i, pair in enumerate(zip(queries.lengths, keys.lengths, strict=True)) if pair == (t, s)]
        rows, columns = (
            torch.tensor([starts[side][i] for i in own])[:, None] + torch.arange(n) for side, n in ((0, t), (1, s))
        )  # int [R, t], [R, s]
        a, b, c = q[rows.to(q.device)], k[columns.to(k.device)], v[columns.to(v.device)]
        a, b, c = (x.transpose(1, 2) for x in (a, b, c))  # [R, H, t, d], [R, G, s, d]
        y = attend(a, b, c, "causal" if causal else None, chosen, scale)
        done.append(y.transpose(1, 2).flatten(0, 1))
        places.append(rows.flatten())
    if not done:
        return torch.empty_like(q)
    return torch.cat(done)[torch.cat(places).argsort().to(q.device)]


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
        # Layers spread over several devices: each gets its own where it is.
        return self.data[layer, 0, :, :, :end].to(k.device), self.data[layer, 1, :, :, :end].to(k.device)

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has written."""
        self.filled += positions

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` [B'], in that order; repeats are allowed."""
        self.data = self.data[:, :, rows]
