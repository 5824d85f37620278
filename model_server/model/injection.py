"""Recurrent visual injection (FUSE-RSVLM): before chosen decoder layers the visual tokens look at the detail stacks
again, through a router over the stacks and a gated residual.

    w = softmax_j(key(mean_t D_j) . query(mean_t h) / sqrt(d)),  D = sum_j w_j D_j
    h <- h + s * sigmoid(W_g [LN(h); LN(D)]) * W_d LN(D)

h are the hidden states of an image's tokens, D_j its K detail stacks; the query is of the hidden states as they are at
that layer. Nothing is kept on a module: the stacks are an argument, so no call can see the image before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Details:
    """Detail stacks of those rows of a batch that show an image; their sequences begin with its V tokens."""

    rows: Tensor  # int [R], rows of the batch
    stacks: Tensor  # [R, K, V, D]
    real: Tensor  # bool [R, V], False where a row has fewer visual tokens than V


class Router(nn.Module):
    """How much each stack counts for the image as the decoder sees it now."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.key_norm, self.key = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, stacks: Tensor, real: Tensor) -> Tensor:
        """hidden [R, V, D], stacks [R, K, V, D], real [R, V] -> weights [R, K] that sum to 1."""
        share = real.to(hidden.dtype) / real.sum(1, keepdim=True)  # mean over the real tokens
        query = self.query(self.query_norm(torch.einsum("rv,rvd->rd", share, hidden)))
        keys = self.key(self.key_norm(torch.einsum("rv,rkvd->rkd", share, stacks)))
        scores = torch.einsum("rkd,rd->rk", keys, query) / math.sqrt(hidden.shape[-1])
        # Half precision can overflow: then every stack counts alike, as published.
        finite = scores.isfinite().all(1, keepdim=True)
        return torch.where(finite, scores, 0.0).softmax(-1)


class Injection(nn.Module):
    """One injection; `scale` is the learned residual scale s, 1 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = Router(width)
        self.hidden_norm, self.detail_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate = nn.Linear(2 * width, width)
        self.project = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, details: Details) -> Tensor:
        """x [B, T, D] -> [B, T, D]; only the visual tokens change. A sequence shorter than V is left as it is."""
        v = details.stacks.shape[2]
        if x.shape[1] < v:
            return x
        hidden = x[details.rows, :v]  # [R, V, D]
        weights = self.router(hidden, details.stacks, details.real)
        detail = self.detail_norm(torch.einsum("rk,rkvd->rvd", weights, details.stacks))
        gate = self.gate(torch.cat((self.hidden_norm(hidden), detail), -1)).sigmoid()
        delta = self.scale * gate * self.project(detail) * details.real[..., None]
        return x.index_put((details.rows,), torch.cat((hidden + delta, x[details.rows, v:]), 1))
