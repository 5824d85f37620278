"""Low-rank adaptation (LoRA, Hu et al. 2021) of linear layers: W x + alpha / rank * B A x, with W frozen.

For stage 2 of the papers: Aquila has rank 64 and alpha 16, FUSAR-GPT rank 8, alpha 32 and dropout .05. B starts at
zero, so an untrained adaptation changes nothing; `merge_lora` adds it to W, and the model is then saved as any other.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.modulation import TokenModulation

# Every linear layer of the decoder's blocks, as FUSAR-GPT has it; low-rank experts are what they are already.
LINEARS = r"decoder\.blocks\.\d+\.(?!experts\.deltas\.).*"


class LoRA(nn.Module):
    """A linear layer and its adaptation."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        dropped = F.dropout(x, self.dropout, self.training)
        return self.base(x) + self.scale * F.linear(F.linear(dropped, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with the adaptation in its weight."""
        self.base.weight += self.scale * (self.up.float() @ self.down.float()).to(self.base.weight.dtype)
        return self.base


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, layers: str = LINEARS) -> list[str]:
    """Freeze a model and adapt its linear layers whose names match `layers`; returns those names.

    Raises:
        ValueError: none matches, or the rank is not positive.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(layers, n)]
    if not names or rank < 1:
        raise ValueError(f"{len(names)} linear layers match {layers!r} and the rank is {rank}; both must be positive")
    model.requires_grad_(False)
    for name in names:
        _put(model, name, LoRA(_linear(model, name), rank, alpha, dropout))
    return names


def train_only(model: nn.Module, stage: Literal["knowledge", "tasks"]) -> list[str]:
    """Let only that train which a stage of FUSAR-GPT's fine-tuning trains; returns the parameters' names.

    Stage 1, knowledge: the adaptations and the modulation by what is known of a place. Stage 2, tasks: the same
    adaptations go on, and the modulation stays as stage 1 left it.

    Raises:
        ValueError: the model has no adaptations (`add_lora` makes them) or no modulation.
    """
    adapted = [m for m in model.modules() if isinstance(m, LoRA)]
    known = [m for m in model.modules() if isinstance(m, TokenModulation)]
    if not adapted or not known:
        raise ValueError(f"two stages need adaptations and a modulation; there are {len(adapted)} and {len(known)}")
    model.requires_grad_(False)
    for module in adapted:
        module.down.requires_grad_(True)
        module.up.requires_grad_(True)
    for module in known:
        module.requires_grad_(stage == "knowledge")
    return [name for name, p in model.named_parameters() if p.requires_grad]


def merge_lora(model: nn.Module) -> None:
    """Put each adaptation into its layer; the model has its own parameters' names again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            _put(model, name, module.merged())


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adaptations alone, by name: what a stage-2 checkpoint needs beside its base."""
    return {
        f"{name}.{part}": getattr(m, part).detach()
        for name, m in model.named_modules() if isinstance(m, LoRA) for part in ("down", "up")
    }  # fmt: skip


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
