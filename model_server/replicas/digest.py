"""Which image a call is about, told from its bytes without decoding them."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from model_server.batching.feature_cache import image_key

NATIVE = "/v1/perceive"


def image_of(path: str, body: bytes) -> str | None:
    """A digest that calls about the same image share; None where the body tells of none.

    On the native wire it is that of the first tile's pixels, under which replicas keep features; in JSON that of the
    last data URL as it is written. A body that is wrong is not refused here: who decodes it says what is wrong.
    """
    return _first_tile(body) if path == NATIVE else _last_picture(body)


def _first_tile(body: bytes) -> str | None:
    size = int.from_bytes(body[:8], "little")  # of the safetensors header
    try:
        entry = json.loads(body[8 : 8 + size])["tile_0"]
        begin, end = entry["data_offsets"]
        pixels = np.frombuffer(body, np.uint8, end - begin, 8 + size + begin).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return image_key(pixels).hex()


def _last_picture(body: bytes) -> str | None:
    start = body.rfind(b'"data:image/')
    end = body.find(b'"', start + 1)
    if start == -1 or end == -1:
        return None
    return hashlib.blake2b(memoryview(body)[start:end], digest_size=16).hexdigest()
