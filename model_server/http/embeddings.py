"""OpenAI embeddings of the contrastive head: texts and pictures as unit vectors of one space.

The product of a text's and a picture's vector ranks captions for a picture and pictures for a caption.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, Field

from model_server.http.openai_wire import CallError, check_model, read_body
from model_server.http.pictures import PictureError, tile_of
from model_server.http.usage import CountsTokens
from model_server.protocol import MAX_TEXT, PerceiveRequest

MAX_INPUTS = 64
MAX_PIXEL_BYTES = 128 * 2**20  # decoded: a small file may hold many


@runtime_checkable
class HasVectors(Protocol):
    """A loaded model with a contrastive head."""

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray: ...

    def image_vectors(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


class NoVectors(ValueError):
    """The loaded model has no contrastive head."""

    def __init__(self, model: str) -> None:
        super().__init__(f"the loaded model {model!r} has no contrastive head: its texts and images have no vectors")


class EmbeddingsRequest(BaseModel):
    """OpenAI's request; a text that is a data URL is a picture."""

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding:
    """One request on its way through the model; `items` are texts and pictures, uint8 [H, W, 3]."""

    def __init__(self, body: bytes, model: str) -> None:
        """Raises CallError or UnknownModel."""
        self.request = read_body(EmbeddingsRequest, body)
        check_model(self.request.model, model)
        if len(self.request.inputs) > MAX_INPUTS:
            raise CallError(f"a request may have {MAX_INPUTS} inputs, this one has {len(self.request.inputs)}", "input")
        self.items: list[str | np.ndarray] = []
        self.pixel_bytes = 0
        for number, text in enumerate(self.request.inputs):
            item = _item(number, text)
            self.pixel_bytes += item.nbytes if isinstance(item, np.ndarray) else 0
            if self.pixel_bytes > MAX_PIXEL_BYTES:
                raise CallError(f"the images are more than {MAX_PIXEL_BYTES >> 20} MiB of pixels: send fewer", "input")
            self.items.append(item)

    def vectors(self, model: object) -> np.ndarray:
        """float32 [N, E] unit rows of a model that has vectors. Runs where the model does."""
        assert isinstance(model, HasVectors)
        texts = [(i, item) for i, item in enumerate(self.items) if isinstance(item, str)]
        pictures = [(i, item) for i, item in enumerate(self.items) if not isinstance(item, str)]
        rows: dict[int, np.ndarray] = {}
        if texts:
            rows.update(zip((i for i, _ in texts), model.text_vectors([text for _, text in texts]), strict=True))
        if pictures:
            vectors = model.image_vectors([picture for _, picture in pictures])
            rows.update(zip((i for i, _ in pictures), vectors, strict=True))
        return np.stack([rows[i] for i in range(len(self.items))]).astype(np.float32)

    def answer(self, vectors: np.ndarray, name: str, model: object) -> dict[str, Any]:
        """The list of embeddings. Raises CallError where another number of dimensions was asked for."""
        if self.request.dimensions not in (None, vectors.shape[1]):
            raise CallError(f"vectors of this model have {vectors.shape[1]} dimensions", "dimensions")
        data = [
            {"object": "embedding", "index": i, "embedding": self._encoded(row)} for i, row in enumerate(vectors)
        ]
        tokens = self._tokens(model)
        return {
            "object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }  # fmt: skip

    def _encoded(self, row: np.ndarray) -> str | list[float]:
        if self.request.encoding_format == "base64":
            return base64.b64encode(row.astype("<f4").tobytes()).decode()
        return row.tolist()

    def _tokens(self, model: object) -> int:
        """Of the texts; a picture is read whole, without tokens."""
        if not isinstance(model, CountsTokens):
            return 0
        texts = [item for item in self.items if isinstance(item, str)]
        return sum(model.prompt_tokens(PerceiveRequest(task="ground", text=text), 0) for text in texts)


def _item(number: int, text: str) -> str | np.ndarray:
    if text[:5].lower() == "data:":
        try:
            return tile_of(text)
        except PictureError as error:
            raise CallError(f"input {number}: {error}", "input") from error
    if not text.strip() or len(text) > MAX_TEXT:
        raise CallError(f"input {number} must have 1 to {MAX_TEXT} letters, it has {len(text.strip())}", "input")
    return text
