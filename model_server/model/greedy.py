"""Greedy decoding over a prefilled batch, whatever the model: the likeliest token at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_server.model.rsvlm import DecodeState


class Repetition:
    """What has been said loses (CTRL, arXiv 1909.05858, as `transformers` has it): logits above 0 are divided by the
    penalty, those below multiplied. `said`: bool [B, V]."""

    def __init__(self, penalty: float, said: Tensor) -> None:
        self.penalty, self.said = penalty, said

    @classmethod
    def after(cls, penalty: float, rows: Sequence[Sequence[int]], vocabulary: int,
              device: torch.device | str = "cpu") -> Repetition | None:  # fmt: skip
        """Rows of ids that count as said before the first token; None where the penalty, 1, changes nothing."""
        if penalty == 1:
            return None
        said = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
        for mask, ids in zip(said, rows, strict=True):
            mask[list(ids)] = True
        return cls(penalty, said.to(device))

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B, V]."""
        lost = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.said, lost, logits)

    def note(self, tokens: Tensor) -> None:
        """Tokens int [B] are said."""
        self.said = self.said.scatter(1, tokens[:, None], True)


@torch.no_grad()
def follow(step: Callable[[Tensor, DecodeState], Tensor], logits: Tensor, state: DecodeState, steps: int,
           end: int | None, repetition: Repetition | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids [B, S] and their logits [B, S, V] from the first token's logits [B, V]; stops when all rows have ended.

    A row that has ended goes on as `end`. repetition: bears on the choice, not on the logits given back.
    """
    ids, seen = [likeliest(logits, repetition)], [logits]
    ended = torch.zeros_like(ids[0], dtype=torch.bool) if end is None else ids[0] == end
    while len(ids) < steps and not ended.all():
        logits = step(ids[-1], state)
        token = likeliest(logits, repetition)
        if end is not None:
            token = torch.where(ended, end, token)
            ended = ended | (token == end)
        ids.append(token)
        seen.append(logits)
    return torch.stack(ids, 1), torch.stack(seen, 1)


def likeliest(logits: Tensor, repetition: Repetition | None = None) -> Tensor:
    """The token int [B] of the highest logits [B, V], after what has been said, which it joins."""
    if repetition is None:
        return logits.argmax(-1)
    token = repetition(logits).argmax(-1)
    repetition.note(token)
    return token
