"""Images in memory and their augmentation: crop, dihedral turn, brightness, contrast and colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from model_server.model.vision import square
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


def augmented(image: np.ndarray, side: int, rng: np.random.Generator, min_crop: float = 0.75) -> Tensor:
    """A random view as uint8 [3, side, side]: crop, one of the eight turns of the square, photometric change."""
    h, w = image.shape[:2]
    share = rng.uniform(min_crop, 1.0)
    ch, cw = (round(n * share * rng.uniform(0.94, 1.0)) for n in (h, w))
    top, left = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
    x = square(image[top : top + ch, left : left + cw], side)
    turn = int(rng.integers(8))
    x = torch.rot90(x, turn % 4, (1, 2))
    if turn >= 4:
        x = x.flip(2)
    contrast, brightness = rng.uniform(0.8, 1.2, 2)
    gain = rng.uniform(0.94, 1.06, 3) * brightness
    offset = float(x[:, ::8, ::8].float().mean()) * (gain - contrast)
    levels = np.arange(256)[None] * contrast + offset[:, None]  # a table of 256 levels a channel
    table = torch.from_numpy(levels.clip(0, 255).astype(np.uint8))
    return torch.stack([table[c][x[c].long()] for c in range(3)])


def batches(
    images: Sequence[np.ndarray], order: Sequence[np.ndarray], side: int, seed: int, first: int = 0
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield (step, indices, uint8 [B, 3, side, side]) for each index array of `order` from step `first`.

    Each batch has a random generator of its own, so a run resumed at a later step sees the same views. Made in
    the calling thread: a second one costs more than it saves where every core already runs the network.
    """
    for step in range(first, len(order)):
        rng = np.random.default_rng((seed, step))
        yield step, order[step], torch.stack([augmented(images[i], side, rng) for i in order[step]])
