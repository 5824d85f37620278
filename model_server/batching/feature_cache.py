"""What was computed of an image or a text, kept for the next question about it: least recently used goes first.

Sizes are counted in bytes, because features of a large look weigh a hundred times those of a small one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np

from model_server.batching.counters import CacheValues

V = TypeVar("V")


def image_key(image: np.ndarray) -> bytes:
    """Digest of an array's pixels and shape."""
    digest = hashlib.blake2b(f"{image.dtype} {image.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


class ByteCache(Generic[V]):
    """Values under keys, together at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._held: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable) -> V | None:
        """The value, which is then the most recently used; None where there is none."""
        found = self._held.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keep a value of so many bytes, in place of an older one; one larger than the limit is not kept."""
        self._remove(key)
        if size > self.limit:
            return
        self._held[key] = value, size
        self.bytes += size
        while self.bytes > self.limit:
            self._remove(next(iter(self._held)))
            self.evictions += 1

    def clear(self) -> None:
        self._held.clear()
        self.bytes = 0

    def values(self) -> CacheValues:
        return {
            "hits": self.hits, "misses": self.misses, "evictions": self.evictions, "entries": len(self),
            "bytes": self.bytes, "limit_bytes": self.limit,
        }  # fmt: skip

    def _remove(self, key: Hashable) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self.bytes -= found[1]
