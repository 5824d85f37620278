"""Recurrent visual injection (FUSE-RSVLM): before chosen decoder layers the visual tokens look at the detail stacks
again, through a router over the stacks and a gated residual.

    w = softmax_j(key(mean_t D_j) . query(mean_t h) / sqrt(d)),  D = sum_j w_j D_j
    h <- h + s * sigmoid(W_g [LN(h); LN(D)]) * W_d LN(D)

h are the hidden states of an image's tokens, D_j its K detail stacks; the query is of the hidden states as they are at
that layer. Nothing is kept on a module: the stacks are an argument, so no call can see the image before it.

The paper speaks of injection during generation; its code injects at prefill only, into the visual tokens. With
`every_step` each token of text looks again too, with the same weights, as it is read or written. The paper does not say
how; here a token's own state is the query, and as it has no place in the image, D_j is its mean over the image:

    w = softmax_j(key(mean_t D_j) . query(h) / sqrt(d)),  D = sum_j w_j mean_t D_j
    h <- h + s * sigmoid(W_g [LN(h); LN(D)]) * W_d LN(D)

So a step needs K vectors of an image, not its maps, and cached decoding equals the full pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepDetails:
    """What a decoding step sees of the stacks."""

    means: Tensor  # [B, K, D]
    known: Tensor  # bool [B], whether a row of the batch shows an image

    def select(self, rows: Tensor) -> StepDetails:
        """Keep these rows of the batch, in this order; repeats are allowed."""
        return StepDetails(self.means[rows], self.known[rows])


@dataclass(frozen=True)
class Details:
    """Detail stacks of those rows of a batch that show an image; their sequences begin with its V tokens."""

    rows: Tensor  # int [R], rows of the batch
    stacks: Tensor  # [R, K, V, D]
    real: Tensor  # bool [R, V], False where a row has fewer visual tokens than V
    batch: int  # B, all rows
    every_step: bool = False  # text looks at them too, else visual tokens only

    @cached_property
    def steps(self) -> StepDetails | None:
        """For the steps after this prompt; None where nothing is injected at them."""
        if not self.every_step:
            return None
        means = torch.einsum("rv,rkvd->rkd", _share(self.real, self.stacks), self.stacks)
        at = self.rows[:, None, None].expand_as(means)
        known = torch.zeros(self.batch, dtype=torch.bool, device=means.device)
        return StepDetails(
            means.new_zeros(self.batch, *means.shape[1:]).scatter(0, at, means), known.index_fill(0, self.rows, True)
        )

    @cached_property
    def text(self) -> Tensor:
        """Where text begins in each row of the batch, int [B]: behind its visual tokens."""
        return self.rows.new_zeros(self.batch).index_copy(0, self.rows, self.real.sum(1))


def _share(real: Tensor, like: Tensor) -> Tensor:
    """Weights [R, V] of a mean over the real tokens."""
    return real.to(like.dtype) / real.sum(1, keepdim=True)


class Router(nn.Module):
    """How much each stack counts for the image as the decoder sees it now."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.key_norm, self.key = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, stacks: Tensor, real: Tensor) -> Tensor:
        """hidden [R, V, D], stacks [R, K, V, D], real [R, V] -> weights [R, K] that sum to 1."""
        share = _share(real, hidden)
        means = torch.einsum("rv,rkvd->rkd", share, stacks)
        return self.of_means(torch.einsum("rv,rvd->rd", share, hidden)[:, None], means)[:, 0]

    def of_means(self, hidden: Tensor, means: Tensor) -> Tensor:
        """Hidden states [R, T, D], each of which asks for itself, and mean stacks [R, K, D] -> [R, T, K]."""
        query = self.query(self.query_norm(hidden))
        keys = self.key(self.key_norm(means))
        scores = torch.einsum("rtd,rkd->rtk", query, keys) / math.sqrt(hidden.shape[-1])
        # Half precision can overflow: then every stack counts alike, as published.
        finite = scores.isfinite().all(-1, keepdim=True)
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

    def forward(self, x: Tensor, details: Details | StepDetails) -> Tensor:
        """x [B, T, D] -> [B, T, D]: of prompts, whose visual tokens change and, at `every_step`, the text behind them;
        or of steps, which are text. A prompt shorter than V keeps its visual tokens."""
        if isinstance(details, StepDetails):
            return self._text(x, details, x.new_ones(1, x.shape[1], dtype=torch.bool))
        x = self._visual(x, details)
        if details.steps is None:
            return x
        return self._text(x, details.steps, torch.arange(x.shape[1], device=x.device) >= details.text[:, None])

    def _text(self, x: Tensor, details: StepDetails, where: Tensor) -> Tensor:
        """Each token of rows with an image, where `where` (bool [B, T]) says so, by its own state."""
        detail = self.detail_norm(self.router.of_means(x, details.means) @ details.means)  # [B, T, D]
        gate = self.gate(torch.cat((self.hidden_norm(x), detail), -1)).sigmoid()
        return torch.where((where & details.known[:, None])[..., None], x + self.scale * gate * self.project(detail), x)

    def _visual(self, x: Tensor, details: Details) -> Tensor:
        v = details.stacks.shape[2]
        if x.shape[1] < v:
            return x
        hidden = x[details.rows, :v]  # [R, V, D]
        weights = self.router(hidden, details.stacks, details.real)
        detail = self.detail_norm(torch.einsum("rk,rkvd->rvd", weights, details.stacks))
        gate = self.gate(torch.cat((self.hidden_norm(hidden), detail), -1)).sigmoid()
        delta = self.scale * gate * self.project(detail) * details.real[..., None]
        return x.index_put((details.rows,), torch.cat((hidden + delta, x[details.rows, v:]), 1))
