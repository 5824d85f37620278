"""Granularity-oriented mixture of experts (RSUniVLM, G-MoE): one feed-forward expert per granularity.

The router is training-free: it reads the task token. Routing is per request, so one batch may mix granularities;
the published code takes one granularity for a whole batch. An expert is a whole copy of the layer, as published, or a
low-rank difference from a shared one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import DecoderConfig

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


def _wanted(expert: Tensor, experts: int) -> list[int]:
    """The rows of `expert` once each; of a single expert they are not looked at."""
    return [0] if experts == 1 else expert.unique().tolist()


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
        wanted = _wanted(expert, len(self.experts))
        if len(wanted) == 1:
            return self.experts[wanted[0]](x)
        out = torch.empty_like(x)
        for e in wanted:
            rows = expert == e
            out[rows] = self.experts[e](x[rows])
        return out


class Delta(nn.Module):
    """B A x: what an expert adds to one matrix of the shared layer; B starts at zero, so that it adds nothing."""

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class LowRankExperts(nn.Module):
    """G-MoE with less memory: one shared SwiGLU, of whose three matrices W expert e has W + B_e A_e.

    Every token of a mixed batch passes the shared matrices together; only the deltas go by groups of one expert.
    """

    def __init__(self, width: int, hidden: int, experts: Sequence[str], rank: int) -> None:
        super().__init__()
        self.shared = SwiGLU(width, hidden)
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        self.deltas = nn.ModuleList(
            nn.ModuleDict({name: Delta(into, out, rank) for name, (into, out) in shapes.items()}) for _ in experts
        )

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x [B, T, D]; expert int [B] on the CPU, the row of each sequence's expert."""
        gate = self._add(self.shared.gate(x), x, expert, "gate")
        hidden = F.silu(gate) * self._add(self.shared.up(x), x, expert, "up")
        return self._add(self.shared.down(hidden), hidden, expert, "down")

    def _add(self, y: Tensor, x: Tensor, expert: Tensor, name: str) -> Tensor:
        wanted = _wanted(expert, len(self.deltas))
        if len(wanted) == 1:
            return y + self.deltas.get_submodule(f"{wanted[0]}.{name}")(x)
        for e in wanted:
            rows = (expert == e).nonzero()[:, 0].to(y.device)
            y = y.index_add(0, rows, self.deltas.get_submodule(f"{e}.{name}")(x[rows]))
        return y


def build_experts(config: DecoderConfig) -> GranularExperts | LowRankExperts:
    """Whole copies, or low-rank deltas where `expert_rank` asks for them."""
    if config.expert_rank:
        return LowRankExperts(config.width, config.ffn, config.experts, config.expert_rank)
    return GranularExperts(config.width, config.ffn, config.experts)


@torch.no_grad()
def start_as_copies(experts: GranularExperts | LowRankExperts, trained: SwiGLU) -> None:
    """Every expert computes what a trained feed-forward layer computes (RSUniVLM, stage 2 starts so)."""
    if isinstance(experts, LowRankExperts):
        experts.shared.load_state_dict(trained.state_dict())
        for name, p in experts.deltas.named_parameters():
            if name.endswith("up.weight"):
                p.zero_()
        return
    for expert in experts.experts:
        expert.load_state_dict(trained.state_dict())


def train_experts_only(model: nn.Module) -> list[str]:
    """Freeze a model but for what its experts have of their own (RSUniVLM, stage 2); their parameters' names."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, GranularExperts):
            module.requires_grad_(True)
        elif isinstance(module, LowRankExperts):
            module.deltas.requires_grad_(True)
    return [name for name, p in model.named_parameters() if p.requires_grad]
