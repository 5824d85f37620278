"""Continuous decoding over static key/value slots: sequences join and leave between any two steps.

What an image becomes in the decoder does not depend on the text behind it (see rsvlm), so its keys and values are a
`Prefix`, made once per image, view and expert, whatever is asked of it. A sequence takes one slot for each view of its
image: its prefix, its prompt, then every token of every hypothesis of its beam search, one after the other. Hypotheses
of one sequence share a slot, and a mask says whose ancestors a place holds; so reordering beams moves no key or value.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.attention import KVCache
from model_server.model.generate import Beams, Hypothesis, candidates, continuations
from model_server.model.injection import StepDetails
from model_server.model.rsvlm import RSVLM, Features, Questions
from model_server.model.static_steps import StaticSteps, as_graph
from model_server.model.transfer import sent


@dataclass(frozen=True)
class Prefix:
    """The visual part of R sequences behind the decoder of one expert."""

    keys: Tensor  # [layers, 2, R, G, P, d], keys and values
    expert: int
    details: StepDetails | None = None  # where every step looks at them again

    @property
    def nbytes(self) -> int:
        details = 0 if self.details is None else self.details.means.nbytes + self.details.known.nbytes
        return self.keys.nbytes + details

    def split(self, rows: int) -> list[Prefix]:
        """Prefixes of `rows` rows each, with memory of their own."""
        count = self.keys.shape[2] // rows
        details: list[StepDetails | None] = [None] * count
        if self.details is not None:
            parts = zip(self.details.means.split(rows), self.details.known.split(rows), strict=True)
            details = [StepDetails(means.clone(), known.clone()) for means, known in parts]
        keys = self.keys.split(rows, 2)
        return [Prefix(part.clone(), self.expert, d) for part, d in zip(keys, details, strict=True)]

    def first(self, rows: int) -> Prefix:
        details = self.details and StepDetails(self.details.means[:rows], self.details.known[:rows])
        return Prefix(self.keys[:, :, :rows], self.expert, details)

    def upright(self) -> Prefix:
        """The first view, which is not turned, in the place of all."""
        views = self.keys.shape[2]
        first = self.first(1)
        details = first.details and StepDetails(
            torch.cat([first.details.means] * views), torch.cat([first.details.known] * views)
        )
        return Prefix(torch.cat([first.keys] * views, 2), self.expert, details)

    @classmethod
    def joined(cls, prefixes: Sequence[Prefix]) -> Prefix:
        """One of them all, in order; all have the same expert."""
        (expert,) = {prefix.expert for prefix in prefixes}
        found = [prefix.details for prefix in prefixes if prefix.details is not None]
        return cls(torch.cat([prefix.keys for prefix in prefixes], 2), expert, _joined(found))


def _joined(details: Sequence[StepDetails]) -> StepDetails | None:
    """Of all rows, in order; None where there are none."""
    if not details:
        return None
    return StepDetails(torch.cat([d.means for d in details]), torch.cat([d.known for d in details]))


def visual_prefix(model: RSVLM, features: Features, expert: int) -> Prefix:
    """The prefix of every row of `features`."""
    b, p = features.visual.shape[:2]
    c = model.config.decoder
    cache = KVCache(c.layers, b, c.kv_heads, p, c.width // c.heads, features.visual)
    positions = torch.arange(p, device=features.visual.device).expand(b, p)
    details = model.details(features)
    model.decoder.remember(
        features.visual, positions, None, torch.full((b,), expert), features.windows, cache, details
    )
    return Prefix(cache.data, expert, None if details is None else details.steps)


@dataclass(frozen=True)
class Prompt:
    """R prefilled sequences: their prefixes, what the text behind them became, and the next token's logits."""

    prefix: Prefix
    keys: Tensor  # [layers, 2, R, G, T, d]
    real: Tensor  # bool [R, T], False where a shorter text is padded
    logits: Tensor  # [R, vocabulary]


def prefill(model: RSVLM, prefix: Prefix, task: int, questions: Questions | None) -> Prompt:
    """Run [question | task token] behind the prefixes of R sequences."""
    layers, _, b, g, p, d = prefix.keys.shape
    device = prefix.keys.device
    parts = [model.decoder.embed(torch.full((b, 1), task, device=device))]
    real = [torch.ones(b, 1, dtype=torch.bool, device=device)]
    if questions is not None:
        states, vectors = questions.states.to(prefix.keys.dtype), questions.vectors.to(prefix.keys.dtype)
        parts = [model.question_vector(vectors)[:, None], model.question_states(states), *parts]
        real = [questions.mask.any(1, keepdim=True), questions.mask, *real]
    x, seen = torch.cat(parts, 1), torch.cat(real, 1)
    t = x.shape[1]
    cache = KVCache(layers, b, g, p + t, d, prefix.keys)
    cache.data[..., :p, :] = prefix.keys
    cache.filled = p
    places = torch.arange(t, device=device)
    own = (places[None, :] <= places[:, None]) & seen[:, None, :] | torch.eye(t, dtype=torch.bool, device=device)
    mask = torch.cat((own.new_ones(b, t, p), own), -1)[:, None]
    positions = p + (seen.cumsum(1) - 1).clamp(min=0)  # padding takes no position
    hidden = model.decoder(x, positions, mask, torch.full((b,), prefix.expert), None, cache, prefix.details)
    return Prompt(prefix, cache.data[..., p:, :], seen, model.decoder.logits(hidden[:, -1]))


class _Slots(KVCache):
    """Keys and values of `rows` slots of `length` places, each filled up to a place of its own."""

    def __init__(self, layers: int, rows: int, length: int, heads: int, width: int, like: Tensor) -> None:
        # Not touched before it is used, so that slots nobody needs take no memory.
        self.data = torch.empty(layers, 2, rows, length, heads, width, dtype=like.dtype, device=like.device)
        self.rows = self.at = torch.zeros(0, 0, dtype=torch.long)
        self.filled = 0

    def aim(self, at: Tensor, filled: int) -> None:
        """The next writing goes to the places `at` [R, T] of the first R slots, none of them at `filled` or behind."""
        self.rows, self.at = torch.arange(len(at), device=at.device)[:, None], at
        self.filled = filled

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [R, G, T, d] of one layer -> all places up to the last one filled, [R, G, S, d] each."""
        r = len(self.rows)
        both = self.data[layer]
        both[0][self.rows, self.at] = k.transpose(1, 2)
        both[1][self.rows, self.at] = v.transpose(1, 2)
        return both[0, :r, : self.filled].transpose(1, 2), both[1, :r, : self.filled].transpose(1, 2)

    def advance(self, positions: int) -> None:
        """Nothing: `aim` says where the next tokens go."""


@dataclass
class _Seat:
    """A sequence in a lane: how far its slots are filled, and the position of its next token."""

    key: Hashable
    search: Beams
    filled: int
    position: int
    expert: int
    details: StepDetails | None


class Lane:
    """Beam searches of one kind, in the order in which they lie in their slots; each step writes a token of all.

    Args:
        model: evaluated without gradients by the caller.
        sequences: most at a time.
        views: slots of a sequence, whose log-probabilities are averaged.
        prompt: most tokens in front of an answer, visual ones included.
        beams, steps, end, length_power: of `Beams`.
        banned: bool [vocabulary], tokens that are never said.
        static: whether steps have fixed shapes; None = on a GPU, where these become graphs.
    """

    def __init__(self, model: RSVLM, *, sequences: int, views: int, prompt: int, beams: int, steps: int, end: int,
                 banned: Tensor, length_power: float, static: bool | None = None) -> None:  # fmt: skip
        self.model, self.views, self.sequences = model, views, sequences
        self._search = (beams, steps, end, length_power)
        self._beams, self._banned = beams, banned
        self.length = prompt + beams * (steps - 1)
        c, like = model.config.decoder, model.queries
        self._slots = _Slots(c.layers, sequences * views, self.length, c.kv_heads, c.width // c.heads, like)
        self._visible = torch.zeros(sequences, beams, self.length, dtype=torch.bool, device=like.device)
        self._seats: list[_Seat] = []
        gpu = like.device.type == "cuda"
        fixed = StaticSteps(self._write_static, sequences, like.device, as_graph if gpu else None)
        self._static = fixed if static or (gpu and static is None) else None

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def free(self) -> int:
        """Sequences that may still join."""
        return self.sequences - len(self._seats)

    @classmethod
    def nbytes(cls, model: RSVLM, views: int, prompt: int, beams: int, steps: int) -> int:
        """Bytes of the slots of one sequence."""
        c = model.config.decoder
        width = c.width // c.heads * c.kv_heads
        return c.layers * 2 * views * (prompt + beams * (steps - 1)) * width * model.queries.element_size()

    def join(self, keys: Sequence[Hashable], prompt: Prompt) -> dict[Hashable, list[Hypothesis]]:
        """Begin the sequences of a prompt, whose rows are sequence by sequence, `views` rows each.

        Returns the answers of those that ended with their first token.
        """
        n = len(keys)
        logits = _agreed(prompt.logits.view(n, self.views, 1, -1))
        scores = torch.zeros(n, 1, device=logits.device)
        found = candidates(continuations(logits, scores, self._banned, self._beams))
        ended: dict[Hashable, list[Hypothesis]] = {}
        for i, key in enumerate(keys):
            search = Beams(*self._search)
            if search.advance(found[i]):
                self._seat(key, search, prompt, i)
            else:
                ended[key] = search.best()
        return ended

    def _seat(self, key: Hashable, search: Beams, prompt: Prompt, sequence: int) -> None:
        at, own = len(self._seats), slice(sequence * self.views, (sequence + 1) * self.views)
        if at == self.sequences:
            raise IndexError(f"all {self.sequences} places of this lane are taken")
        rows = slice(at * self.views, (at + 1) * self.views)
        real = prompt.real[own.start].nonzero()[:, 0]
        p = prompt.prefix.keys.shape[4]
        filled = p + len(real)
        data = self._slots.data
        data[:, :, rows, :p] = prompt.prefix.keys[:, :, own].transpose(3, 4)
        data[:, :, rows, p:filled] = prompt.keys[:, :, own][..., real, :].transpose(3, 4)
        data[:, :, rows, filled:] = 0  # what lies there from before is masked, and must not be NaN
        self._visible[at] = False
        self._visible[at, :, :filled] = True
        details = prompt.prefix.details
        kept = details and StepDetails(details.means[own], details.known[own])
        self._seats.append(_Seat(key, search, filled, filled, prompt.prefix.expert, kept))

    def step(self) -> dict[Hashable, list[Hypothesis]]:
        """One more token of every hypothesis of every sequence; the answers of those that ended leave the lane."""
        seats, k = self._seats, self._beams
        if not seats:
            return {}
        found = candidates(self._found(self._told()))
        ended = []
        for i, seat in enumerate(seats):
            seat.filled += k
            seat.position += 1
            if not seat.search.advance(found[i]):
                ended.append(i)
        answers = {seats[i].key: seats[i].search.best() for i in ended}
        for i in reversed(ended):
            self._leave(i)
        return answers

    def _told(self) -> Tensor:
        """What a step must know, double [n, 5, K], so that one transfer is enough: where each hypothesis is written,
        which it goes on from, its token, the token's position, its log-probability."""
        k = self._beams
        return torch.tensor([
            (range(seat.filled, seat.filled + k), seat.search.parents, seat.search.tokens, [seat.position] * k,
             seat.search.scores)
            for seat in self._seats
        ], dtype=torch.double)  # fmt: skip

    def _found(self, told: Tensor) -> Tensor:
        """The best continuations [n, 2 K, 3] of all sequences."""
        experts = [seat.expert for seat in self._seats]
        details = _joined([seat.details for seat in self._seats if seat.details is not None])
        if self._static is not None and details is None and len(set(experts)) == 1:
            return self._static(told, experts[0])
        filled = max(seat.filled for seat in self._seats) + self._beams
        return self._write(sent(told, self._visible.device), filled, torch.tensor(experts), details)

    def _write_static(self, told: Tensor, expert: int) -> Tensor:
        """As `_write`, looking at all places, filled or not."""
        return self._write(told, self.length, torch.full((len(told),), expert), None)

    def _write(self, told: Tensor, filled: int, experts: Tensor, details: StepDetails | None) -> Tensor:
        """Write a token of every hypothesis of the first n sequences: `told` [n, 5, K] on the device -> their best
        continuations [n, 2 K, 3]. Places from `filled` on are not looked at. With one expert nothing here waits for
        the device."""
        n, _, k = told.shape
        v = self.views
        at, parents, tokens, positions = told[:, :4].long().unbind(1)  # [n, K] each
        visible = self._visible[:n]
        visible.copy_(visible.gather(1, parents[..., None].expand_as(visible)).scatter_(2, at[..., None], True))
        self._slots.aim(at.repeat_interleave(v, 0), filled)
        mask = visible[..., :filled].repeat_interleave(v, 0)[:, None]  # [n V, 1, K, S]
        x = self.model.decoder.embed(tokens).repeat_interleave(v, 0)  # [n V, K, W]
        hidden = self.model.decoder(
            x, positions.repeat_interleave(v, 0), mask, experts.repeat_interleave(v), None, self._slots, details
        )
        logits = _agreed(self.model.decoder.logits(hidden).view(n, v, k, -1))  # [n, K, vocabulary]
        return continuations(logits, told[:, 4].float(), self._banned, k)

    def drop(self, key: Hashable) -> None:
        """Its places are free again at once; nothing happens where it has left already."""
        for i, seat in enumerate(self._seats):
            if seat.key == key:
                self._leave(i)
                return

    def _leave(self, i: int) -> None:
        """The last sequence moves into the place that becomes free."""
        last, v = len(self._seats) - 1, self.views
        if i != last:
            filled, data = self._seats[last].filled, self._slots.data
            data[:, :, i * v : (i + 1) * v, :filled] = data[:, :, last * v : (last + 1) * v, :filled]
            self._visible[i] = self._visible[last]
            self._seats[i] = self._seats[last]
        self._seats.pop()


def _agreed(logits: Tensor) -> Tensor:
    """[n, V, K, vocabulary] -> [n, K, vocabulary]: what the views of each sequence say together."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.float().log_softmax(-1).mean(1)
