"""What passes between a family's dialect, which knows tasks, and its speaker, which knows pixels and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from model_server.protocol import PerceiveRequest, Task, TileAnswer
from model_server.query import Query


@dataclass(frozen=True)
class Ask:
    """One message to the model.

    images: uint8 [H, W, 3] each, shown before the message, in this order.
    anchors: float32 [S, 66] of the first image (see protocol.py), or None.
    expert: row of the feed-forward expert, 0 where a model has one.
    steps: most tokens that it may say.
    options: where given, nothing is said: each option is weighed as the whole answer.
    """

    images: tuple[np.ndarray, ...]
    message: str
    steps: int
    expert: int = 0
    options: tuple[str, ...] = ()
    anchors: np.ndarray | None = None


@dataclass(frozen=True)
class Said:
    """An answer in the model's own words.

    logprob: of all its tokens, the one that ends it included; tokens: how many.
    weights: with options, their probabilities among one another.
    """

    text: str
    logprob: float = 0.0
    tokens: int = 1
    weights: tuple[float, ...] = ()

    @classmethod
    def weighed(cls, options: Sequence[str], ids: Sequence[Sequence[int]], logprobs: Sequence[float]) -> Said:
        """The likeliest option, with the share of each among them."""
        most = max(logprobs)
        shares = [math.exp(p - most) for p in logprobs]
        best = list(logprobs).index(most)
        return cls(options[best], most, len(ids[best]) + 1, tuple(share / sum(shares) for share in shares))

    @property
    def probability(self) -> float:
        """Of the whole answer, as the model sees it; not calibrated."""
        return min(math.exp(self.logprob), 1.0)

    @property
    def mean_probability(self) -> float:
        """Of a token on (geometric) average; not calibrated."""
        return min(math.exp(self.logprob / self.tokens), 1.0)


class Speaker(Protocol):
    """A loaded network that answers messages about pictures."""

    precision: str

    def say(self, asks: Sequence[Ask]) -> list[Said]:
        """Answer every message, in order; greedy decoding, as published."""
        ...

    def quantise(self) -> None:
        """Keep the weights of the decoder's linear layers in eight bits from now on."""
        ...


class Dialect(Protocol):
    """How a family is asked for each task, and what its words mean."""

    name: str
    tasks: tuple[Task, ...]
    anchored: bool  # whether anchors bear on its answers

    def route(self, task: Task) -> tuple[str, str]:
        """Task token and expert that serve a task."""
        ...

    def ask(self, query: Query) -> list[Ask]:
        """The messages that answer a query; segmentation has one for each class."""
        ...

    def read(self, query: Query, said: Sequence[Said]) -> TileAnswer:
        """The answer. Raises MalformedText where the words do not hold what they should."""
        ...

    def cautions(self, request: PerceiveRequest) -> list[str]:
        """What is special about a family's answers to a request."""
        ...


@dataclass(frozen=True)
class Opened:
    """A loaded checkpoint; folders: all that its answers depend on."""

    dialect: Dialect
    speaker: Speaker
    folders: tuple[Path, ...]
