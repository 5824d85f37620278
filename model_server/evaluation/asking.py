"""Putting many queries to the resident model in batches, with or without the image."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from rich.progress import track

from model_server.perceiver import Query
from model_server.protocol import ModelInfo, TileAnswer, TileCaption, TileClasses, TileVqa

BATCH = 32

Item = TypeVar("Item")
Answer = TypeVar("Answer", TileCaption, TileVqa, TileClasses)


class Answering(Protocol):
    """What answers queries."""

    info: ModelInfo

    def answer(self, queries: Sequence[Query]) -> Sequence[TileAnswer]: ...


class Model(Answering, Protocol):
    """The part of the resident model that an evaluation needs."""

    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray: ...

    def image_vectors(self, images: Sequence[np.ndarray]) -> np.ndarray: ...

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray: ...


def ask(model: Model, queries: Iterable[Query], total: int, kind: type[Answer], title: str) -> list[Answer]:
    """Answers of one kind to a stream of queries, in their order.

    The stream is consumed batch by batch, so that images are decoded only when their batch comes up. Raises TypeError
    when the model answers with another kind than `kind`.
    """
    answers: list[Answer] = []
    batches = _batches(queries)
    for batch in progress(batches, title, -(-total // BATCH)):
        for answer in model.answer(batch):
            if not isinstance(answer, kind):
                raise TypeError(f"asked for {kind.__name__}, the model answered {type(answer).__name__}")
            answers.append(answer)
    return answers


def mean_colour(image: np.ndarray) -> np.ndarray:
    """An image of the same size, uint8 [H, W, 3], of the mean colour and nothing else: what the blind control sees."""
    colour = image.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.broadcast_to(colour, image.shape).copy()


def progress(items: Iterable[Item], title: str, total: int) -> Iterable[Item]:
    """The items, behind a bar that goes away when they are done; one line where nobody watches."""
    if not sys.stdout.isatty():
        print(title, file=sys.stderr, flush=True)
        return items
    return track(items, title, total=total, transient=True)


def _batches(queries: Iterable[Query]) -> Iterator[list[Query]]:
    stream = iter(queries)
    while batch := list(islice(stream, BATCH)):
        yield batch
