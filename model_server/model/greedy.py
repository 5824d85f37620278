"""Greedy decoding over a prefilled batch, whatever the model: the likeliest token at each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model_server.model.rsvlm import DecodeState


@torch.no_grad()
def follow(step: Callable[[Tensor, DecodeState], Tensor], logits: Tensor, state: DecodeState, steps: int,
           end: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids [B, S] and their logits [B, S, V] from the first token's logits [B, V]; stops when all rows have ended.

    A row that has ended goes on as `end`.
    """
    ids, seen = [logits.argmax(-1)], [logits]
    ended = torch.zeros_like(ids[0], dtype=torch.bool) if end is None else ids[0] == end
    while len(ids) < steps and not ended.all():
        logits = step(ids[-1], state)
        token = logits.argmax(-1)
        if end is not None:
            token = torch.where(ended, end, token)
            ended = ended | (token == end)
        ids.append(token)
        seen.append(logits)
    return torch.stack(ids, 1), torch.stack(seen, 1)
