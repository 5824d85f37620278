"""What chat tests send: pictures as data URLs, and messages that hold them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def data_url(picture: np.ndarray, kind: str = "png") -> str:
    """A picture, uint8 [H, W, 3], as the data URL of an image file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str | None, *urls: str) -> dict[str, Any]:
    """A message of the user: images, then a text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text is not None else [])]}
