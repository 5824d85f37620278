"""The wire between the tools and the model server: what is asked of a tile and what comes back.

Shared by both sides, so it needs pydantic, numpy and safetensors only. A request travels as one safetensors
body: tensors `tile_0` .. `tile_{n-1}`, each uint8 [H, W, 3] RGB, and the request as JSON under the metadata
key `request`. The answer is a safetensors body too (tensors for dense answers), its JSON under `response`.
No pickle, no base64.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.numpy import load, save

SERVICE = "rs-perception-model-server"  # how /health names itself
MAX_TILES = 256
MAX_TILE_SIDE = 2048
MAX_TEXT = 500
MAX_LABELS = 200
MAX_LABEL_LENGTH = 80
MAX_BODY_BYTES = 256 * 2**20

Task = Literal["caption", "vqa", "classify"]
Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
AnswerKind = Literal["yes_no", "count", "area", "category", "text"]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PerceiveRequest(Wire):
    """One task over one or more tiles of a scene. Every tile is answered by itself; the caller merges."""

    task: Task
    text: str = Field(default="", max_length=MAX_TEXT, description="vqa: the question")
    labels: list[Label] = Field(default_factory=list, max_length=MAX_LABELS, description="classify: empty = taxonomy")
    detail: Literal["short", "full"] = "short"

    @model_validator(mode="after")
    def _question_is_asked(self) -> PerceiveRequest:
        if self.task == "vqa" and not self.text.strip():
            raise ValueError("a vqa request needs its question in `text`")
        return self


class TileCaption(Wire):
    caption: str
    confidence: float = Field(ge=0, le=1)


class RankedAnswer(Wire):
    answer: str
    confidence: float = Field(ge=0, le=1)


class TileVqa(Wire):
    """`abstained`: the calibrated confidence is below the level at which this model's answers are worth giving."""

    answer: str
    kind: AnswerKind
    confidence: float = Field(ge=0, le=1)
    abstained: bool
    alternatives: list[RankedAnswer]


class TileClasses(Wire):
    """Calibrated probabilities of the whole closed list, in the order of `labels`."""

    labels: list[str]
    scores: list[float]


class ModelInfo(Wire):
    """What answered: enough to reproduce it."""

    model: str
    weights_digest: str
    attention_backend: str
    precision: str
    device: str


class PerceiveResponse(Wire):
    """Answers in tile order; exactly the list that belongs to the task is filled."""

    captions: list[TileCaption] = []
    vqa: list[TileVqa] = []
    classes: list[TileClasses] = []
    model: ModelInfo
    task_token: str
    expert: str
    warnings: list[str] = []
    elapsed_s: float


class WireError(ValueError):
    """The body is not a request or answer of this protocol."""


def encode_request(request: PerceiveRequest, tiles: list[np.ndarray]) -> bytes:
    """Pack a request and its tiles (each uint8 [H, W, 3]) into one safetensors body."""
    tensors = {f"tile_{i}": np.ascontiguousarray(tile) for i, tile in enumerate(tiles)}
    return save(tensors, metadata={"request": request.model_dump_json()})


def decode_request(body: bytes) -> tuple[PerceiveRequest, list[np.ndarray]]:
    """Unpack and check a request.

    Raises:
        WireError: not safetensors, no request in it, or tiles of a wrong count, shape or type.
    """
    tensors, text = _unpack(body, "request")
    try:
        request = PerceiveRequest.model_validate_json(text)
    except ValueError as error:
        raise WireError(f"the request's fields are wrong: {error}") from error
    if not 1 <= len(tensors) <= MAX_TILES:
        raise WireError(f"a request carries 1 to {MAX_TILES} tiles, this one {len(tensors)}")
    tiles = []
    for i in range(len(tensors)):
        tile = tensors.get(f"tile_{i}")
        if tile is None:
            raise WireError(f"tensors must be named tile_0 .. tile_{len(tensors) - 1}; tile_{i} is missing")
        if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape[2] != 3 or 0 in tile.shape:
            raise WireError(f"tile_{i} must be uint8 [H, W, 3], it is {tile.dtype} {list(tile.shape)}")
        if max(tile.shape) > MAX_TILE_SIDE:
            raise WireError(f"tile_{i} is {tile.shape[1]}x{tile.shape[0]}; a side may have {MAX_TILE_SIDE} pixels")
        tiles.append(tile)
    return request, tiles


def encode_response(response: PerceiveResponse) -> bytes:
    """Pack an answer. Safetensors wants at least one tensor, so dense answers or an empty one ride along."""
    return save({"empty": np.zeros(0, np.uint8)}, metadata={"response": response.model_dump_json()})


def decode_response(body: bytes) -> PerceiveResponse:
    """Unpack an answer; raises WireError as `decode_request` does."""
    _, text = _unpack(body, "response")
    try:
        return PerceiveResponse.model_validate_json(text)
    except ValueError as error:
        raise WireError(f"the answer's fields are wrong: {error}") from error


def _unpack(body: bytes, key: str) -> tuple[dict[str, np.ndarray], str]:
    import json

    try:
        tensors = load(body)
        size = int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own type, which is not public
        raise WireError("the body is not a safetensors file") from error
    if key not in metadata:
        raise WireError(f"the body's metadata has no key {key!r}")
    return tensors, metadata[key]
