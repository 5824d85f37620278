"""Images in memory and their augmentation: crop, dihedral turn, brightness, contrast and colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from model_server.model.vision import square
from model_server.training.processes import share
from model_server.training.records import Record, load_image


def load_images(records: Sequence[Record], title: str) -> list[np.ndarray]:
    """Decode the first image of each record to uint8 [H, W, 3], two at a time, with a progress bar."""
    with ThreadPoolExecutor(2) as pool:
        decoded = pool.map(lambda r: load_image(r.images[0]), records)
        return list(track(decoded, description=title, total=len(records)))


def thinned(records: Sequence[Record], limit: int | None) -> list[Record]:
    """About `limit` records, evenly spread; all of them where it is None."""
    return list(records[:: max(len(records) // limit, 1) if limit else 1])


def epoch_order(
    records: Sequence[Record], repeat: Mapping[str, int], steps: int, batch: int, seed: int
) -> list[np.ndarray]:
    """Index arrays of each step: epochs of shuffled images, each set's images `repeat` times."""
    pool = np.concatenate([np.repeat(i, repeat.get(r.set, 1)) for i, r in enumerate(records)])
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // len(pool))
    stream = np.concatenate([rng.permutation(pool) for _ in range(epochs)])
    return [stream[i * batch : (i + 1) * batch] for i in range(steps)]


@dataclass(frozen=True)
class View:
    """A random view: crop, one of the eight turns of the square, photometric change."""

    crop: tuple[int, int, int, int]  # top, left, height, width in pixels of the image
    turn: int
    contrast: float
    gain: np.ndarray  # of each channel

    @classmethod
    def draw(cls, height: int, width: int, rng: np.random.Generator, min_crop: float = 0.75) -> Self:
        """For an image of this size; drawn apart from its pixels, so that a view not rendered costs nothing."""
        part = rng.uniform(min_crop, 1.0)
        ch, cw = (round(n * part * rng.uniform(0.94, 1.0)) for n in (height, width))
        top, left = int(rng.integers(0, height - ch + 1)), int(rng.integers(0, width - cw + 1))
        turn = int(rng.integers(8))
        contrast, brightness = rng.uniform(0.8, 1.2, 2)
        return cls((top, left, ch, cw), turn, contrast, rng.uniform(0.94, 1.06, 3) * brightness)

    def of(self, image: np.ndarray, side: int) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [3, side, side]."""
        top, left, height, width = self.crop
        x = square(image[top : top + height, left : left + width], side)
        x = torch.rot90(x, self.turn % 4, (1, 2))
        if self.turn >= 4:
            x = x.flip(2)
        offset = float(x[:, ::8, ::8].float().mean()) * (self.gain - self.contrast)
        levels = np.arange(256)[None] * self.contrast + offset[:, None]  # a table of 256 levels a channel
        table = torch.from_numpy(levels.clip(0, 255).astype(np.uint8))
        return torch.stack([table[c][x[c].long()] for c in range(3)])


def batches(
    images: Sequence[np.ndarray], order: Sequence[np.ndarray], side: int, seed: int, first: int = 0
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield (step, indices, uint8 [B, 3, side, side]) for each index array of `order` from step `first`.

    Indices are of the whole batch, views of this process's share of it (see processes.py).
    Each batch has a random generator of its own, so a run resumed at a later step sees the same views. Made in
    the calling thread: a second one costs more than it saves where every core already runs the network.
    """
    for step in range(first, len(order)):
        rng = np.random.default_rng((seed, step))
        views = [(View.draw(images[i].shape[0], images[i].shape[1], rng), images[i]) for i in order[step]]
        yield step, order[step], torch.stack([view.of(image, side) for view, image in views[share(len(views))]])
