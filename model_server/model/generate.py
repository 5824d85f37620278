"""Decoding: beam search over a prefilled batch, and sampling for self-critical training.

Knows token ids only, nothing of words or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.rsvlm import RSVLM, DecodeState


@dataclass(frozen=True)
class Hypothesis:
    """A finished answer: its ids without the end token, and the log-probability of all of it."""

    ids: tuple[int, ...]
    logprob: float

    def score(self, length_power: float) -> float:
        """Log-probability over length to a power; 0 compares whole answers, 1 their mean token."""
        return self.logprob / (len(self.ids) + 1) ** length_power


@torch.no_grad()
def beam_search(model: RSVLM, logits: Tensor, state: DecodeState, *, beams: int, steps: int, end: int,
                banned: Tensor, length_power: float = 0.7) -> list[list[Hypothesis]]:  # fmt: skip
    """The best answers of each sequence, best first, at most `beams`; greedy decoding is `beams=1`.

    logits [B, V] are those of the first token; banned: bool [V], tokens that are never said. An answer that has not
    ended after `steps` tokens counts as ended.
    """
    b, v = logits.shape
    device = logits.device
    scores = torch.full((b, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    done: list[list[Hypothesis]] = [[] for _ in range(b)]
    ids = torch.zeros(b, beams, 0, dtype=torch.long, device=device)
    live = list(range(b))  # which sequence each group of `beams` rows belongs to
    state.select(torch.arange(b, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    for t in range(steps):
        n = len(live)
        logp = logits.float().masked_fill(banned, -torch.inf).log_softmax(-1).view(n, beams, v)
        total = (scores[..., None] + logp).flatten(1)  # [n, beams * V]
        best, flat = total.topk(2 * beams, -1)  # enough even when half of them end
        from_beam, token = flat // v, flat % v
        keep_rows, keep_tokens, next_scores, next_ids, next_live = [], [], [], [], []
        last = t == steps - 1
        for i, sequence in enumerate(live):
            rows, tokens, kept = [], [], []
            for s, f, w in zip(best[i].tolist(), from_beam[i].tolist(), token[i].tolist(), strict=True):
                if s == -float("inf"):
                    continue
                said = tuple(ids[i, f].tolist())
                if w == end or last:
                    done[sequence].append(Hypothesis(said if w == end else (*said, w), s))
                elif len(rows) < beams:
                    rows.append(f)
                    tokens.append(w)
                    kept.append(s)
                if len(rows) == beams:
                    break
            if not rows or _settled(done[sequence], kept[0], t + 1, beams, length_power):
                continue
            while len(rows) < beams:  # fewer live candidates than beams: repeat with no chance
                rows.append(rows[0])
                tokens.append(tokens[0])
                kept.append(-float("inf"))
            keep_rows += [i * beams + f for f in rows]
            keep_tokens += tokens
            next_scores.append(kept)
            next_ids.append(torch.cat((ids[i, rows], torch.tensor(tokens, device=device)[:, None]), 1))
            next_live.append(sequence)
        if not next_live:
            break
        live = next_live
        state.select(torch.tensor(keep_rows, device=device))
        scores = torch.tensor(next_scores, device=device)
        ids = torch.stack(next_ids)
        logits = model.step(torch.tensor(keep_tokens, device=device), state)
    return [sorted(d, key=lambda h: -h.score(length_power))[:beams] for d in done]


def _settled(done: list[Hypothesis], best_live: float, length: int, beams: int, power: float) -> bool:
    """Whether the search may stop: enough answers ended, and all beat the best that is still being written."""
    if len(done) < beams:
        return False
    worst = sorted((h.score(power) for h in done), reverse=True)[beams - 1]
    return worst >= best_live / (length + 1) ** power


@torch.no_grad()
def sample(model: RSVLM, logits: Tensor, state: DecodeState, *, steps: int, end: int, banned: Tensor,
           generator: torch.Generator) -> Tensor:  # fmt: skip
    """One random answer of each sequence at temperature 1: ids [B, T], `end` repeated after the end."""
    out, ended = [], torch.zeros(logits.shape[0], dtype=torch.bool)
    for t in range(steps):
        weights = logits.float().masked_fill(banned, -torch.inf).softmax(-1)
        token = torch.multinomial(weights, 1, generator=generator)[:, 0]
        token = torch.where(ended, end, token)
        out.append(token)
        ended |= token == end
        if ended.all() or t == steps - 1:
            break
        logits = model.step(token, state)
    return torch.stack(out, 1)
