"""The wire between the tools and the model server: what is asked of a tile and what comes back.

Shared by both sides, so it needs pydantic, numpy and safetensors only. A request travels as one safetensors
body: tensors `tile_0` .. `tile_{n-1}`, each uint8 [H, W, 3] RGB, and the request as JSON under the metadata
key `request`. What is known of a tile's place may ride along as `anchors_0` .. `anchors_{n-1}`, float32 [S, 66]: 64
values of an AlphaEarth embedding and its place (y, x) as shares of the tile's height and width; S may be 0, and a
request has them for every tile or for none. The answer is a safetensors body too, its JSON under `response`;
probabilities of masks and change ride as its tensors `mask_{i}` [K, H, W] and `change_{i}` [H, W], uint8, on the pixels
of the i-th sent tile or pair. No pickle, no base64.
"""

from __future__ import annotations

from collections.abc import Sequence
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
MAX_HEADER_BYTES = 2**20  # of a request's safetensors header; parsed, it takes thirty times as much
MAX_CLASSES = 16  # of a segmentation
MAX_DEADLINE_S = 3600.0
MAX_CALLER = 64  # letters of a caller's name
ANCHOR_VALUES = 64 + 2  # of an anchor: the vector, then y and x
MAX_ANCHORS = 64**2  # of a tile
UNUSED_ANCHORS = "This model is not modulated by embeddings: those that were given are not used."
MAX_MASK_BYTES = 256 * 2**20  # of all masks of one answer: classes times pixels of all tiles

Task = Literal["caption", "vqa", "classify", "ground", "segment", "detect_change"]
Modality = Literal["optical", "sar"]
Priority = Literal["interactive", "bulk"]
DENSE_TASKS: tuple[Task, ...] = ("ground", "segment", "detect_change")  # answered pixel by pixel
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
AnswerKind = Literal["yes_no", "count", "area", "category", "text"]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


class PerceiveRequest(Wire):
    """One task over one or more tiles of a scene. Every tile is answered by itself; the caller merges.

    `detect_change` takes its tiles in pairs, tile_0 before, tile_1 after, tile_2 before, ..., the two of a pair of one
    shape, and answers every pair. `gsd_m` is the size of a tile's pixel on the ground in metres; from it the server
    chooses the scale at which it looks, and where it is None, by a search over scales. `anchors` are not in the JSON:
    they travel as tensors; a model that is not modulated by them says in a warning that it did not use them.
    """

    task: Task
    text: str = Field(
        default="",
        max_length=MAX_TEXT,
        description="vqa: the question; ground: the phrase; detect_change: the kind of change, empty = any",
    )
    labels: list[Label] = Field(
        default_factory=list, max_length=MAX_LABELS, description="classify: empty = taxonomy; segment: the classes"
    )
    detail: Literal["short", "full"] = "short"
    gsd_m: float | None = Field(default=None, gt=0, description="ground metres per tile pixel; None = unknown")
    modality: Modality = "optical"
    priority: Priority = Field(
        default="interactive", description="interactive goes first; bulk, the tiles of a large scene, still goes on"
    )
    deadline_s: float | None = Field(
        default=None, gt=0, le=MAX_DEADLINE_S, description="seconds from arrival after which nobody wants the answer"
    )
    caller: str = Field(
        default="", max_length=MAX_CALLER, description="requests of one caller share one turn; empty = a caller each"
    )
    anchors: list[np.ndarray] = Field(
        default_factory=list, exclude=True, repr=False, description="float32 [S, 66] of each tile; empty = none known"
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> PerceiveRequest:
        if self.task == "vqa" and not self.text.strip():
            raise ValueError("a vqa request needs its question in `text`")
        if self.task == "ground" and not self.text.strip():
            raise ValueError("a ground request needs the phrase to look for in `text`, for example 'ship'")
        if self.task == "segment" and not 1 <= len(self.labels) <= MAX_CLASSES:
            raise ValueError(
                f"a segment request needs 1 to {MAX_CLASSES} classes in `labels`, this one has {len(self.labels)}"
            )
        if self.task == "segment" and not all(label.strip() for label in self.labels):
            raise ValueError("a class in `labels` is blank: name each one")
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


class TileObjects(Wire):
    """What a phrase names in one tile, best first.

    Everything down to a score of 0.02 is here, so that a caller can merge across tiles and set its own limit before
    it cuts at `threshold`, from which on objects are worth giving.
    """

    boxes: list[tuple[float, float, float, float]] = Field(description="x1, y1, x2, y2 in pixels of the sent tile")
    scores: list[UnitFloat] = Field(description="calibrated: the chance that the box is right")
    threshold: UnitFloat
    known: bool = Field(description="False: the phrase is far from everything the model was trained on")
    scale: float = Field(gt=0, description="pixels looked at per pixel of the tile")

    @model_validator(mode="after")
    def _each_box_has_a_score(self) -> TileObjects:
        if len(self.boxes) != len(self.scores):
            raise ValueError(f"{len(self.boxes)} boxes with {len(self.scores)} scores")
        return self


class TileMasks(Wire):
    """How likely each pixel of one tile belongs to each of `labels`, independently of one another.

    A pixel belongs to class k where `probabilities[k] / 255 >= thresholds[k]`. The array is not in the JSON: it
    travels as the tensor `mask_{i}`.
    """

    labels: list[str]
    thresholds: list[UnitFloat]
    known: list[bool] = Field(description="False: the label is far from everything the model was trained on")
    scale: float = Field(gt=0, description="pixels looked at per pixel of the tile; of several, the finest")
    probabilities: np.ndarray = Field(
        default_factory=lambda: np.zeros((0, 0, 0), np.uint8), exclude=True, repr=False, description="uint8 [K, H, W]"
    )

    @model_validator(mode="after")
    def _each_label_is_answered(self) -> TileMasks:
        if not len(self.labels) == len(self.thresholds) == len(self.known):
            raise ValueError(
                f"{len(self.labels)} labels with {len(self.thresholds)} thresholds and {len(self.known)} `known`"
            )
        return self


class TileChange(Wire):
    """How likely each pixel of one pair has changed: where `probabilities / 255 >= threshold`.

    The array is not in the JSON: it travels as the tensor `change_{i}`.
    """

    threshold: UnitFloat
    scale: float = Field(gt=0, description="pixels looked at per pixel of the tiles")
    probabilities: np.ndarray = Field(
        default_factory=lambda: np.zeros((0, 0), np.uint8), exclude=True, repr=False, description="uint8 [H, W]"
    )


TileAnswer = TileCaption | TileVqa | TileClasses | TileObjects | TileMasks | TileChange


class ModelInfo(Wire):
    """What answered: enough to reproduce it."""

    model: str
    weights_digest: str
    attention_backend: str
    precision: str
    device: str


class PerceiveResponse(Wire):
    """Answers in the order of the tiles (pairs, for change); exactly the list that belongs to the task is filled."""

    captions: list[TileCaption] = []
    vqa: list[TileVqa] = []
    classes: list[TileClasses] = []
    objects: list[TileObjects] = []
    masks: list[TileMasks] = []
    changes: list[TileChange] = []
    model: ModelInfo
    task_token: str
    expert: str
    warnings: list[str] = []
    elapsed_s: float


class TaskNotServed(ValueError):
    """The loaded model has no part for a task; `served` are the tasks it has parts for."""

    def __init__(self, task: Task, model: str, served: Sequence[Task]) -> None:
        super().__init__(
            f"the loaded model {model!r} has no part for {task}, it serves {', '.join(served)}: use one of these, or "
            "a model server with weights that have a dense branch (dense.safetensors)"
        )


class WireError(ValueError):
    """The body is not a request or answer of this protocol."""


def encode_request(request: PerceiveRequest, tiles: list[np.ndarray]) -> bytes:
    """Pack a request and its tiles (each uint8 [H, W, 3]) into one safetensors body."""
    tensors = {f"tile_{i}": np.ascontiguousarray(tile) for i, tile in enumerate(tiles)}
    tensors |= {f"anchors_{i}": np.ascontiguousarray(known) for i, known in enumerate(request.anchors)}
    return save(tensors, metadata={"request": request.model_dump_json()})


def decode_request(body: bytes) -> tuple[PerceiveRequest, list[np.ndarray]]:
    """Unpack and check a request.

    Raises:
        WireError: not safetensors, no request in it, tiles or anchors of a wrong count, shape or type, or masks of more
            than `MAX_MASK_BYTES` asked for.
    """
    if int.from_bytes(body[:8], "little") > MAX_HEADER_BYTES:
        raise WireError(f"the body's safetensors header may have {MAX_HEADER_BYTES} bytes")
    tensors, text = _unpack(body, "request")
    try:
        request = PerceiveRequest.model_validate_json(text)
    except ValueError as error:
        raise WireError(f"the request's fields are wrong: {error}") from error
    known = {name: tensors.pop(name) for name in list(tensors) if name.startswith("anchors_")}
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
    if request.task == "detect_change":
        _check_pairs(tiles)
    if request.task == "segment":
        _check_mask_bytes(len(request.labels), tiles)
    if known:
        request.anchors = _anchors(known, request.task, len(tiles))
    return request, tiles


def _anchors(known: dict[str, np.ndarray], task: Task, tiles: int) -> list[np.ndarray]:
    if task == "detect_change":
        raise WireError("anchors belong to a single tile; detect_change takes none")
    names = [f"anchors_{i}" for i in range(tiles)]
    if set(known) != set(names):
        raise WireError(f"anchors come for every tile or for none: {', '.join(sorted(set(known) ^ set(names)))}")
    for name in names:
        array = known[name]
        if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != ANCHOR_VALUES or len(array) > MAX_ANCHORS:
            raise WireError(
                f"{name} must be float32 [S, {ANCHOR_VALUES}] with S up to {MAX_ANCHORS}, it is {array.dtype} "
                f"{list(array.shape)}"
            )
        if not (np.isfinite(array).all() and ((array[:, -2:] >= 0) & (array[:, -2:] <= 1)).all()):
            raise WireError(f"{name} must be finite, its places (y, x) within 0 and 1")
    return [known[name] for name in names]


def _check_pairs(tiles: list[np.ndarray]) -> None:
    if len(tiles) % 2:
        raise WireError(
            f"detect_change needs pairs of tiles (tile_0 before, tile_1 after, ...), this request has {len(tiles)}"
        )
    for i in range(0, len(tiles), 2):
        (h, w), (other_h, other_w) = tiles[i].shape[:2], tiles[i + 1].shape[:2]
        if (h, w) != (other_h, other_w):
            raise WireError(
                f"tile_{i} is {w}x{h} and tile_{i + 1} {other_w}x{other_h}: the two tiles of a pair must have one "
                "shape and show the same ground"
            )


def _check_mask_bytes(classes: int, tiles: list[np.ndarray]) -> None:
    size = classes * sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    if size > MAX_MASK_BYTES:
        raise WireError(
            f"masks of {classes} classes on these {len(tiles)} tiles are {size >> 20} MiB, an answer may have "
            f"{MAX_MASK_BYTES >> 20}: send fewer tiles in a request, or fewer classes"
        )


def encode_response(response: PerceiveResponse) -> bytes:
    """Pack an answer with its arrays. Safetensors wants at least one tensor, so an empty one rides along."""
    tensors = {"empty": np.zeros(0, np.uint8)}
    tensors |= {f"mask_{i}": np.ascontiguousarray(m.probabilities) for i, m in enumerate(response.masks)}
    tensors |= {f"change_{i}": np.ascontiguousarray(c.probabilities) for i, c in enumerate(response.changes)}
    return save(tensors, metadata={"response": response.model_dump_json()})


def decode_response(body: bytes) -> PerceiveResponse:
    """Unpack an answer; its masks and changes hold their arrays. Raises WireError as `decode_request` does."""
    tensors, text = _unpack(body, "response")
    try:
        response = PerceiveResponse.model_validate_json(text)
    except ValueError as error:
        raise WireError(f"the answer's fields are wrong: {error}") from error
    for i, masks in enumerate(response.masks):
        masks.probabilities = _plane(tensors, f"mask_{i}", 3)
        if len(masks.probabilities) != len(masks.labels):
            raise WireError(f"mask_{i} has {len(masks.probabilities)} planes for {len(masks.labels)} labels")
    for i, change in enumerate(response.changes):
        change.probabilities = _plane(tensors, f"change_{i}", 2)
    return response


def _plane(tensors: dict[str, np.ndarray], name: str, dimensions: int) -> np.ndarray:
    array = tensors.get(name)
    if array is None:
        raise WireError(f"the answer's tensor {name} is missing")
    if array.dtype != np.uint8 or array.ndim != dimensions:
        raise WireError(f"{name} must be uint8 of {dimensions} dimensions, it is {array.dtype} {list(array.shape)}")
    return array


def _unpack(body: bytes, key: str) -> tuple[dict[str, np.ndarray], str]:
    import json

    try:
        tensors = load(body)
        size = int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8 : 8 + size]).get("__metadata__") or {}
    except Exception as error:  # safetensors raises its own type, which is not public
        raise WireError("the body is not a safetensors file") from error
    if key not in metadata:
        raise WireError(f"the body's metadata has no key {key!r}")
    return tensors, metadata[key]
