"""What chat tests send: pictures as data URLs, and messages that hold them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionUserMessageParam


def data_url(picture: np.ndarray, kind: str = "png") -> str:
    """A picture, uint8 [H, W, 3], as the data URL of an image file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def content(text: str | None, *urls: str) -> list[ChatCompletionContentPartParam]:
    """Images, then a text."""
    parts: list[ChatCompletionContentPartParam] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    if text is not None:
        parts.append({"type": "text", "text": text})
    return parts


def user(text: str | None, *urls: str) -> ChatCompletionUserMessageParam:
    """A message of the user."""
    return {"role": "user", "content": content(text, *urls)}
