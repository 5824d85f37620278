"""Decoding: beam search over a prefilled batch, and sampling for self-critical training.

Knows token ids only, nothing of words or tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


Candidate = tuple[float, int, int]  # log-probability, the beam it goes on from, its token


class Beams:
    """The search for one answer: its live hypotheses, as many as `beams` or none, and those that have ended."""

    def __init__(self, beams: int, steps: int, end: int, length_power: float) -> None:
        self.beams, self.steps, self.end, self.length_power = beams, steps, end, length_power
        self.parents: list[int] = []  # which beam each live one goes on from
        self.tokens: list[int] = []
        self.scores = [0.0]
        self.written = 0
        self._ids: list[tuple[int, ...]] = [()]
        self._done: list[Hypothesis] = []

    def advance(self, best: Sequence[Candidate]) -> bool:
        """Take the best 2 * `beams` continuations, best first (enough even when half of them end); whether to go on."""
        last = self.written == self.steps - 1
        kept: list[Candidate] = []
        for score, beam, token in best:
            if score == -math.inf:
                continue
            said = self._ids[beam]
            if token == self.end or last:
                self._done.append(Hypothesis(said if token == self.end else (*said, token), score))
            elif len(kept) < self.beams:
                kept.append((score, beam, token))
            if len(kept) == self.beams:
                break
        self.written += 1
        if not kept or self._settled(kept[0][0]):
            return False
        kept += [(-math.inf, *kept[0][1:])] * (self.beams - len(kept))  # too few candidates: repeat with no chance
        self.scores = [score for score, _, _ in kept]
        self.parents = [beam for _, beam, _ in kept]
        self.tokens = [token for _, _, token in kept]
        self._ids = [(*self._ids[beam], token) for _, beam, token in kept]
        return True

    def best(self) -> list[Hypothesis]:
        """What has ended, best first, at most `beams`."""
        return sorted(self._done, key=lambda h: -h.score(self.length_power))[: self.beams]

    def _settled(self, best_live: float) -> bool:
        """Whether the search may stop: enough answers ended, and all beat the best that is still being written."""
        if len(self._done) < self.beams:
            return False
        worst = sorted((h.score(self.length_power) for h in self._done), reverse=True)[self.beams - 1]
        return worst >= best_live / (self.written + 1) ** self.length_power


def continuations(logits: Tensor, scores: Tensor, banned: Tensor, beams: int) -> Tensor:
    """The best 2 * `beams` of each sequence, best first: logits [n, K, V] behind its K hypotheses, scores [n, K] ->
    double [n, 2 beams, 3] on their device, of each what a `Candidate` holds."""
    v = logits.shape[-1]
    logp = logits.float().masked_fill(banned, -torch.inf).log_softmax(-1)
    best, flat = (scores[..., None] + logp).flatten(1).topk(2 * beams, -1)  # of [n, K * V]
    return torch.stack((best.double(), (flat // v).double(), (flat % v).double()), -1)


def candidates(found: Tensor) -> list[list[Candidate]]:
    """Continuations of each sequence on the host, in one transfer, as each waits for the device."""
    return [[(score, int(beam), int(token)) for score, beam, token in row] for row in found.tolist()]


@torch.no_grad()
def beam_search(model: RSVLM, logits: Tensor, state: DecodeState, *, beams: int, steps: int, end: int,
                banned: Tensor, length_power: float = 0.7) -> list[list[Hypothesis]]:  # fmt: skip
    """The best answers of each sequence, best first, at most `beams`; greedy decoding is `beams=1`.

    logits [B, V] are those of the first token; banned: bool [V], tokens that are never said. An answer that has not
    ended after `steps` tokens counts as ended.
    """
    device = logits.device
    searches = [Beams(beams, steps, end, length_power) for _ in range(len(logits))]
    live, width = searches, 1  # hypotheses of each live sequence: one at first, then `beams`
    logits = logits[:, None]
    while True:
        scores = torch.tensor([search.scores for search in live], device=device)
        found = candidates(continuations(logits, scores, banned, beams))
        going = [i for i, search in enumerate(live) if search.advance(found[i])]
        if not going:
            return [search.best() for search in searches]
        rows = [i * width + beam for i in going for beam in live[i].parents]
        live, width = [live[i] for i in going], beams
        state.select(torch.tensor(rows, device=device))
        tokens = torch.tensor([token for search in live for token in search.tokens], device=device)
        logits = model.step(tokens, state).view(len(live), beams, -1)


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
