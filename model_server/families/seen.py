"""Encoded pictures kept for the next message about them, up to a limit in bytes; the one used longest ago goes first.

A speaker has one network and one processing, so that the pixels are the key, with what is known of their place.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
Shown = tuple[np.ndarray, ...]  # a picture, uint8 [H, W, 3], and where they are known its anchors, float32 [S, 66]
LIMIT = 512 * 2**20


class SeenPictures(Generic[T]):
    """size: bytes of what is kept of one picture."""

    def __init__(self, size: Callable[[T], int], limit: int = LIMIT) -> None:
        self._size, self._limit = size, limit
        self._kept: OrderedDict[bytes, T] = OrderedDict()
        self._bytes = 0

    def of(self, pictures: Sequence[Shown], encode: Callable[[Sequence[Shown]], list[T]],
           together: int) -> list[T]:  # fmt: skip
        """What is encoded of each picture; those not kept are encoded, each once, so many at a time."""
        keys = [_key(picture) for picture in pictures]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in found}
        for start in range(0, len(new), together):
            some = list(new)[start : start + together]
            found.update(zip(some, encode([new[key] for key in some]), strict=True))
        for key, one in found.items():
            self._keep(key, one)
        return [found[key] for key in keys]

    def _keep(self, key: bytes, one: T) -> None:
        if key not in self._kept:
            self._kept[key] = one
            self._bytes += self._size(one)
        self._kept.move_to_end(key)
        while self._bytes > self._limit:
            self._bytes -= self._size(self._kept.popitem(last=False)[1])


def _key(shown: Shown) -> bytes:
    sha = hashlib.sha256(repr([array.shape for array in shown]).encode())
    for array in shown:
        sha.update(np.ascontiguousarray(array).data)
    return sha.digest()
