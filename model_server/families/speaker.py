"""What speakers share: messages are answered in batches, options weighed one message at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from model_server.families.asking import Ask, Said
from model_server.families.speaking import Step, greedy, weigh
from model_server.families.words import Words
from model_server.model.decoder import Decoder
from model_server.model.greedy import Repetition
from model_server.model.int8 import quantise_projections
from model_server.model.rsvlm import DecodeState
from model_server.precision import Precision


class Batch(Protocol):
    """A network's batch of prompts."""

    @property
    def real(self) -> Tensor:
        """bool [B, T], False at padding."""
        ...


P = TypeVar("P", bound=Batch)


class BatchSpeaker(ABC, Generic[P]):
    """Answers messages of any kinds, greedily.

    decoder, step: of the network. rows: messages answered together. context:
    positions the decoder was trained for; what is said ends there.
    """

    def __init__(self, decoder: Decoder, step: Step, words: Words, context: int, rows: int) -> None:
        self.words, self._step, self._context, self._rows = words, step, context, rows
        weight = decoder.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.precision = str(weight.dtype).removeprefix("torch.")
        self._decoder = decoder

    def quantise(self) -> None:
        """Keep the weights of the decoder's linear layers in eight bits from now on."""
        quantise_projections(self._decoder)
        self.precision = Precision.INT8.value

    @abstractmethod
    def _prompt(self, asks: Sequence[Ask]) -> P:
        """The messages with their pictures."""

    @abstractmethod
    def _prefill(self, prompt: P, asks: Sequence[Ask], room: int) -> tuple[Tensor, DecodeState]:
        """Next-token logits [B, V] and the state to go on with, for `room` more tokens."""

    def _counted(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Ids of the prompts that a repetition penalty counts as said: none, where the authors' code gives its decoder
        embeddings instead of ids."""
        return [[] for _ in asks]

    @torch.inference_mode()
    def say(self, asks: Sequence[Ask]) -> list[Said]:
        said: dict[int, Said] = {}
        free = [i for i, ask in enumerate(asks) if not ask.options]
        free.sort(key=lambda i: asks[i].steps)  # those that say much do not keep the others waiting
        for start in range(0, len(free), self._rows):
            group = free[start : start + self._rows]
            said.update(zip(group, self._speak([asks[i] for i in group]), strict=True))
        said.update({i: self._weigh(ask) for i, ask in enumerate(asks) if ask.options})
        return [said[i] for i in range(len(asks))]

    def _speak(self, asks: Sequence[Ask]) -> list[Said]:
        prompt = self._prompt(asks)
        steps = max(1, min(max(ask.steps for ask in asks), self._context - prompt.real.shape[1]))
        logits, state = self._prefill(prompt, asks, steps)
        repetition = None
        if self.words.penalty != 1:
            vocabulary = self._decoder.config.vocab_size
            repetition = Repetition.after(self.words.penalty, self._counted(asks), vocabulary, self.device)
        found = greedy(self._step, logits, state, steps, sorted(self.words.ends), repetition)
        return [Said(self.words.text(u.ids), u.logprob, u.tokens) for u in found]

    def _weigh(self, ask: Ask) -> Said:
        options = [self.words.answer(option) for option in ask.options]
        logits, state = self._prefill(self._prompt([ask]), [ask], max(map(len, options)) + 1)
        found = weigh(self._step, logits, state, options, sorted(self.words.ends))
        return Said.weighed(ask.options, options, found)
