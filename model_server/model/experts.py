"""Granularity-oriented mixture of experts (RSUniVLM, G-MoE): one feed-forward expert per granularity.

The router is training-free: it reads the task token. Routing is per request, so one batch may mix granularities;
the published code takes one granularity for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUTES = {
    "[CAP]": "image",
    "[CLS]": "image",
    "[VQA]": "image",
    "[CCD]": "image",
    "[VG]": "region",
    "[REF]": "region",
    "[SEG]": "pixel",
}


class UnknownTask(ValueError):
    """The router does not know a task token, or the model has no expert for it."""


def route(token: str, experts: Sequence[str]) -> int:
    """Row of the expert that serves a task token."""
    if token not in ROUTES:
        raise UnknownTask(f"no task token {token!r}; the tokens are {', '.join(ROUTES)}")
    if ROUTES[token] not in experts:
        raise UnknownTask(f"{token} needs the {ROUTES[token]!r} expert; this model has {', '.join(experts)}")
    return list(experts).index(ROUTES[token])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GranularExperts(nn.Module):
    """One SwiGLU per expert; each sequence of the batch goes through its own."""

    def __init__(self, width: int, hidden: int, experts: Sequence[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in experts)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x [B, T, D]; expert int [B] on the CPU, the row of each sequence's expert."""
        wanted = expert.unique().tolist()
        if len(wanted) == 1:
            return self.experts[wanted[0]](x)
        out = torch.empty_like(x)
        for e in wanted:
            rows = expert == e
            out[rows] = self.experts[e](x[rows])
        return out
