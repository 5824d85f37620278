"""Words out of a prefilled network: the likeliest, with their probabilities, or given answers weighed.

Knows token ids only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model_server.model.greedy import Repetition, likeliest
from model_server.model.rsvlm import DecodeState

Step = Callable[[Tensor, DecodeState], Tensor]  # int [B] -> logits [B, V]
_ROWS = 32  # answers weighed together


@dataclass(frozen=True)
class Utterance:
    """Ids without the one that ended it, and the log-probability of all, the end included; `tokens` counts it."""

    ids: tuple[int, ...]
    logprob: float
    tokens: int


@torch.inference_mode()
def greedy(step: Step, logits: Tensor, state: DecodeState, steps: int, ends: Sequence[int],
           repetition: Repetition | None = None) -> list[Utterance]:  # fmt: skip
    """The likeliest token at each step, from the first one's logits [B, V]; at most `steps` tokens.

    repetition: bears on the choice; probabilities are the network's own."""
    stop = torch.tensor(list(ends), device=logits.device)
    ids, gained, ended = [], [], torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(steps):
        token = likeliest(logits, repetition)
        best = logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        ids.append(token.masked_fill(ended, int(stop[0])))
        gained.append(best.masked_fill(ended, 0.0))
        ended = ended | torch.isin(token, stop)
        if n == steps - 1 or bool(ended.all()):
            break
        logits = step(ids[-1], state)
    rows, sums = torch.stack(ids, 1).tolist(), torch.stack(gained, 1).sum(1).tolist()
    return [_cut(row, total, ends) for row, total in zip(rows, sums, strict=True)]


def _cut(row: list[int], logprob: float, ends: Sequence[int]) -> Utterance:
    at = next((i for i, token in enumerate(row) if token in ends), None)
    return Utterance(tuple(row[:at]), logprob, len(row) if at is None else at + 1)


@torch.inference_mode()
def weigh(step: Step, logits: Tensor, state: DecodeState, options: Sequence[Sequence[int]],
          ends: Sequence[int]) -> list[float]:  # fmt: skip
    """Log-probability of each option as the whole answer, its end included, after one sequence's prefill.

    logits [1, V]; the state has room for the longest option and is left as it was.
    """
    found: list[float] = []
    for start in range(0, len(options), _ROWS):
        found += _weigh_some(step, logits, state, options[start : start + _ROWS], ends)
    return found


def _weigh_some(step: Step, logits: Tensor, state: DecodeState, options: Sequence[Sequence[int]],
                ends: Sequence[int]) -> list[float]:  # fmt: skip
    n, device = len(options), logits.device
    own = replace(state, cache=copy.copy(state.cache))
    own.select(torch.zeros(n, dtype=torch.long, device=device))  # copies what it keeps
    logits = logits.expand(n, -1)
    total = torch.zeros(n, device=device)
    stop = torch.tensor(list(ends), device=device)
    for at in range(max(map(len, options)) + 1):
        logp = logits.float().log_softmax(-1)
        closing = torch.tensor([at == len(option) for option in options], device=device)
        going = torch.tensor([at < len(option) for option in options], device=device)
        token = torch.tensor([option[at] if at < len(option) else ends[0] for option in options], device=device)
        total += torch.where(closing, logp[:, stop].logsumexp(-1), 0.0)
        total += torch.where(going, logp.gather(1, token[:, None])[:, 0], 0.0)
        if not bool(going.any()):
            break
        logits = step(token, own)
    return total.tolist()
