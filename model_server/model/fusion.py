"""Hierarchical Spatial Feature Integration (Aquila, arXiv 2411.06074, SFI): window-local attention over all scales.

L x L queries; query (r, c) attends only to its own window of every scale's map, so spatial order is kept:
`x_i <- x_i + softmax(q_i k_i^T / sqrt(C)) v_i`, the keys of all scales concatenated (8^2 + 4^2 + 2^2 + 1 = 85 at
Aquila's sizes). MDA repeats it inside chosen decoder layers with weights of their own.

The key and value projections are folded into the query and the result, which is the same function: with
k = W_k m + p, q.k = (W_k^T q).m + q.p, and sum_j a_j W_v m_j = W_v sum_j a_j m_j. So no per-query copy of a map is
made and no map is projected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Windows = dict[int, Tensor]  # stride -> [B, L*L, k_s*k_s, C_s]


class MapWindows(nn.Module):
    """Normalises each scale's map over its channels and cuts it into the L x L windows of the queries."""

    def __init__(self, widths: Mapping[int, int], grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norms = nn.ModuleDict({str(s): nn.LayerNorm(c) for s, c in widths.items()})

    def forward(self, maps: Mapping[int, Tensor]) -> Windows:
        """{stride: [B, C_s, H_s, W_s]} -> {stride: [B, L*L, k_s*k_s, C_s]}; a side must be a multiple of L."""
        return {int(s): norm(self.cut(maps[int(s)])) for s, norm in self.norms.items()}

    def cut(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.grid
        if h % n or w % n:
            raise ValueError(f"a map of {h}x{w} cannot be cut into {n}x{n} windows; its sides must be multiples of {n}")
        x = x.permute(0, 2, 3, 1).reshape(b, n, h // n, n, w // n, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, n * n, (h // n) * (w // n), c)


class SpatialIntegration(nn.Module):
    """One SFI operation on L*L tokens of width D."""

    def __init__(self, widths: Mapping[int, int], keys: Mapping[int, int], width: int,
                 inner: int | None = None) -> None:  # fmt: skip
        """widths: stride -> C_s; keys: stride -> keys per query at that scale; inner: where they meet, default D."""
        super().__init__()
        self.width = inner = inner or width
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.keys = nn.ModuleDict({str(s): nn.Linear(c, inner, bias=False) for s, c in widths.items()})
        self.values = nn.ModuleDict({str(s): nn.Linear(c, width) for s, c in widths.items()})
        # Absolute positions: where in its window, and at which scale, a key stands.
        self.places = nn.ParameterDict(
            {str(s): nn.Parameter(torch.randn(keys[s], inner) * 0.02) for s in widths}
        )  # fmt: skip
        for value in self.values.values():  # start close to the identity: the residual carries the query
            assert isinstance(value, nn.Linear)
            nn.init.normal_(value.weight, std=0.02 / math.sqrt(len(widths)))
            nn.init.zeros_(value.bias)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x [B, L*L, D], windows {stride: [B, L*L, K_s, C_s]} -> [B, L*L, D]."""
        q = self.query(self.norm(x)) / math.sqrt(self.width)
        scores = [
            torch.einsum("bnc,bnkc->bnk", q @ self._weight(self.keys[s]), windows[int(s)]) + q @ self.places[s].T
            for s in self.keys
        ]
        weights = torch.cat(scores, -1).softmax(-1).split([y.shape[-1] for y in scores], -1)
        out = x
        for s, a in zip(self.values, weights, strict=True):
            value = self.values[s]
            assert isinstance(value, nn.Linear)
            gathered = torch.einsum("bnk,bnkc->bnc", a, windows[int(s)])
            out = out + F.linear(gathered, value.weight) + a.sum(-1, keepdim=True) * value.bias
        return out

    @staticmethod
    def repeated(layers: Sequence[int], build: Callable[[], SpatialIntegration],
                 shared: bool) -> dict[int, SpatialIntegration]:  # fmt: skip
        """MDA: an operation for each decoder layer, or one for all."""
        one = build() if shared and layers else None
        return {layer: one or build() for layer in layers}

    @staticmethod
    def _weight(layer: nn.Module) -> Tensor:
        assert isinstance(layer, nn.Linear)
        return layer.weight  # [D, C_s]
