"""The tools: from an image's name to a typed answer.

Each tool checks its inputs, describes the scene, reads tiles of the region, asks the model, and reduces the answers
per tile to one. Raster work runs in worker threads, so that one event loop serves many callers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from model_server.protocol import MAX_LABEL_LENGTH, MAX_LABELS, MAX_TEXT, PerceiveRequest, PerceiveResponse, Task
from rs_tools.errors import InputError, PerceptionError, ServerError
from rs_tools.imagery.access import AccessPolicy, Source, Stamp, stamp_of
from rs_tools.imagery.scene import Pixels, Scene
from rs_tools.imagery.tiling import TilePlan, single_tile
from rs_tools.results import (
    Alternative,
    Band,
    CaptionResult,
    ClassifyResult,
    ClassScore,
    Evidence,
    InspectResult,
    ListedImage,
    ListResult,
    Provenance,
    TileGrid,
    VqaResult,
)

MAX_LISTED = 200
_SCENES_KEPT = 32
_HEAVY_DECIMATION = 4
_NO_DATA = "The region holds no data: every pixel in it is nodata."
_MODALITY_WARNINGS = {
    "multispectral": "The image is multispectral; the model saw only the three bands shown as red, green and blue.",
    "sar": "The image looks like radar (SAR); the model was trained on optical images, so its answer is unreliable.",
    "elevation": "The image looks like elevation, not a picture; the model's answer is unreliable.",
    "classified": "The image is a map of classes, not a picture; the model's answer is unreliable.",
    "grayscale": "The image has one grey band; the model was trained on colour images, so its answer is less reliable.",
    "unknown": "It is not clear what the image's bands measure; the model was trained on optical colour images.",
}


class Perceiving(Protocol):
    """What the tools need of a `ModelClient`."""

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse: ...


@dataclass(frozen=True)
class _Look:
    """A region as it was read for the model. `tiles` is empty where the region holds no data."""

    scene: Scene
    plan: TilePlan
    tiles: list[np.ndarray]
    warnings: list[str]
    started: float


class Tools:
    """Caption, question and class of an image's region, and two helpers, as async functions.

    Every method raises a `PerceptionError` with text for the caller: AccessError (not an allowed file), ImageError
    (not a readable raster), RegionError, InputError, and of the model server ServerBusy, ServerUnavailable,
    ServerError. `image` is a path under an allowed root. `region` is [x1, y1, x2, y2] in pixels, empty for the whole
    image. `bands` are one (grey) or three (red, green, blue) band numbers, empty lets the file decide.

    Args:
        policy: which files may be read.
        client: the way to the model server.
    """

    def __init__(self, policy: AccessPolicy, client: Perceiving) -> None:
        self._policy = policy
        self._client = client
        self._scenes: OrderedDict[tuple[Source, Stamp, tuple[int, ...]], Scene] = OrderedDict()

    async def inspect_image(self, image: str, bands: Sequence[int] = ()) -> InspectResult:
        """Size, bands, data type, georeference and kind of an image. Asks no model."""
        started = time.perf_counter()
        scene = await asyncio.to_thread(self._scene, image, bands)
        return await asyncio.to_thread(_inspection, scene, started)

    async def list_images(self, folder: str = "") -> ListResult:
        """The readable images below a folder (empty: below all allowed folders), at most `MAX_LISTED`."""
        return await asyncio.to_thread(self._list, folder)

    async def caption(
        self,
        image: str,
        region: Sequence[float] = (),
        detail: Literal["short", "full"] = "short",
        bands: Sequence[int] = (),
    ) -> CaptionResult:
        """Describe what a region shows, in one sentence (`short`) or more (`full`)."""
        if detail not in ("short", "full"):
            raise InputError(f"detail must be 'short' or 'full', not {detail!r}.")
        look = await self._look(image, region, bands)
        if not look.tiles:
            return CaptionResult(caption=_NO_DATA, parts=[], confidence=0, **_common(look))
        response = await self._ask(look, PerceiveRequest(task="caption", detail=detail))
        [answer] = response.captions
        return CaptionResult(caption=answer.caption, parts=[], confidence=answer.confidence, **_common(look, response))

    async def vqa(
        self, image: str, question: str, region: Sequence[float] = (), bands: Sequence[int] = ()
    ) -> VqaResult:
        """Answer a question about a region; abstains where the answer is not certain enough."""
        text = _checked_question(question)
        look = await self._look(image, region, bands)
        if not look.tiles:
            return VqaResult(
                answer=_NO_DATA,
                kind="text",
                confidence=0,
                abstained=True,
                alternatives=[],
                evidence=[],
                **_common(look),
            )
        response = await self._ask(look, PerceiveRequest(task="vqa", text=text))
        [answer] = response.vqa
        return VqaResult(
            answer=answer.answer,
            kind=answer.kind,
            confidence=answer.confidence,
            abstained=answer.abstained,
            alternatives=[Alternative(answer=a.answer, confidence=a.confidence) for a in answer.alternatives],
            evidence=[
                Evidence(region=list(region), answer=tile.answer, confidence=tile.confidence)
                for region, tile in zip(look.plan.regions, response.vqa, strict=True)
            ],
            **_common(look, response),
        )

    async def classify(
        self,
        image: str,
        labels: Sequence[str] = (),
        top_k: int = 5,
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
    ) -> ClassifyResult:
        """Choose the class of a region among `labels`, or among the model's own classes where there are none."""
        checked = _checked_labels(labels)
        if not 1 <= top_k <= MAX_LABELS:
            raise InputError(f"top_k must be from 1 to {MAX_LABELS}, not {top_k}.")
        look = await self._look(image, region, bands)
        if not look.tiles:
            return ClassifyResult(label="", score=0, top=[], **_common(look))
        response = await self._ask(look, PerceiveRequest(task="classify", labels=checked))
        [answer] = response.classes
        ranked = sorted(zip(answer.labels, answer.scores, strict=True), key=lambda pair: -pair[1])[:top_k]
        top = [ClassScore(label=label, score=min(1.0, score)) for label, score in ranked]
        return ClassifyResult(label=top[0].label, score=top[0].score, top=top, **_common(look, response))

    async def _look(self, image: str, region: Sequence[float], bands: Sequence[int]) -> _Look:
        return await asyncio.to_thread(self._read, image, region, bands, time.perf_counter())

    def _read(self, image: str, region: Sequence[float], bands: Sequence[int], started: float) -> _Look:
        scene = self._scene(image, bands)
        plan = single_tile(scene.region(region))
        pixels = [scene.read(window, plan.tile_size) for window in plan.regions]
        warnings = [*scene.warnings, *_look_warnings(scene, plan, pixels)]
        seen = any(read.valid.any() for read in pixels)
        return _Look(scene, plan, [_filled(read) for read in pixels] if seen else [], warnings, started)

    def _scene(self, image: str, bands: Sequence[int]) -> Scene:
        """The scene of an image, kept while its file stays the same. Failures are not kept."""
        source = self._policy.resolve(image)
        key = (source, stamp_of(source), tuple(bands))
        scene = self._scenes.pop(key, None) or Scene.open(self._policy, str(source), bands)
        self._scenes[key] = scene  # now the most recently used
        while len(self._scenes) > _SCENES_KEPT:
            self._scenes.popitem(last=False)
        return scene

    async def _ask(self, look: _Look, request: PerceiveRequest) -> PerceiveResponse:
        response = await self._client.perceive(request, look.tiles)
        if _answers(response, request.task) != len(look.tiles):
            raise ServerError(f"The model server did not answer each of the {len(look.tiles)} tiles; try again.")
        return response

    def _list(self, folder: str) -> ListResult:
        started = time.perf_counter()
        paths = list(islice(self._policy.images(folder), MAX_LISTED + 1))
        images: list[ListedImage] = []
        unreadable: list[str] = []
        for path in paths[:MAX_LISTED]:
            try:
                images.append(self._listed(path))
            except PerceptionError as error:
                unreadable.append(str(error))
        warnings = unreadable[:5]
        if len(unreadable) > len(warnings):
            warnings.append(f"{len(unreadable) - len(warnings)} more files cannot be read.")
        return ListResult(
            images=images,
            roots=[str(root) for root in self._policy.roots],
            truncated=len(paths) > MAX_LISTED,
            warnings=warnings,
            provenance=Provenance(elapsed_s=_elapsed(started)),
        )

    def _listed(self, path: Path) -> ListedImage:
        real = self._policy.resolve(str(path))
        with self._policy.open(real) as dataset:
            return ListedImage(
                image=str(path),
                width=dataset.width,
                height=dataset.height,
                band_count=dataset.count,
                dtype=dataset.dtypes[0],
                bytes=stamp_of(real).size,
            )


def _inspection(scene: Scene, started: float) -> InspectResult:
    georeference = scene.georeference
    nodata = scene.nodata
    return InspectResult(
        width=scene.width,
        height=scene.height,
        band_count=len(scene.bands),
        bands=[Band(index=band.index, description=band.description, color=band.color) for band in scene.bands],
        dtype=scene.bands[0].dtype,
        nodata=nodata if nodata is None or math.isfinite(nodata) else _NOT_FINITE[str(nodata)],
        crs_wkt=scene.crs_wkt,
        epsg=georeference.epsg if georeference else None,
        bounds_wgs84=georeference.bounds(scene.width, scene.height) if georeference else None,
        gsd_m=georeference.gsd_m(scene.width, scene.height) if georeference else None,
        modality=scene.modality,
        modality_reason=scene.modality_reason,
        georeferenced=georeference is not None,
        warnings=list(scene.warnings),
        provenance=_scene_provenance(scene, started),
    )


_NOT_FINITE: dict[str, Literal["nan", "inf", "-inf"]] = {"nan": "nan", "inf": "inf", "-inf": "-inf"}


def _common(look: _Look, response: PerceiveResponse | None = None) -> dict:
    """The fields that every answer about a region carries. No response: no model was asked."""
    provenance = _scene_provenance(look.scene, look.started)
    plan = look.plan
    provenance.tile_grid = TileGrid(
        columns=plan.columns,
        rows=plan.rows,
        tile_width=plan.tile_size[0],
        tile_height=plan.tile_size[1],
        decimation=plan.decimation,
    )
    if response is not None:
        provenance.model = response.model.model
        provenance.weights_digest = response.model.weights_digest
        provenance.attention_backend = response.model.attention_backend
        provenance.precision = response.model.precision
        provenance.task_token = response.task_token
        provenance.expert = response.expert
    return {
        "georeferenced": look.scene.georeference is not None,
        "warnings": [*look.warnings, *(response.warnings if response else [])],
        "provenance": provenance,
    }


def _scene_provenance(scene: Scene, started: float) -> Provenance:
    return Provenance(
        image_digest=scene.digest,
        bands=list(scene.choice.indexes),
        stretch=str(scene.stretch),
        elapsed_s=_elapsed(started),
    )


def _look_warnings(scene: Scene, plan: TilePlan, pixels: list[Pixels]) -> list[str]:
    valid = float(np.mean([read.valid.mean() for read in pixels]))
    if valid == 0:
        return [_NO_DATA]
    warnings = []
    if scene.modality in _MODALITY_WARNINGS:
        warnings.append(f"{_MODALITY_WARNINGS[scene.modality]} (Guessed: {scene.modality_reason}.)")
    if valid < 0.5:
        warnings.append(f"Only {valid:.1%} of the region holds data.")
    if all(_uniform(read) for read in pixels):
        warnings.append("The region is of one uniform colour; there is little to see in it.")
    if plan.decimation >= _HEAVY_DECIMATION:
        warnings.append(
            f"The region was reduced {plan.decimation:.1f}-fold for the model; small objects are lost and counts are "
            "too low. Ask about a smaller region for details."
        )
    return warnings


def _uniform(read: Pixels) -> bool:
    colors = read.rgb[read.valid]
    return bool((colors == colors[:1]).all())


def _filled(read: Pixels) -> np.ndarray:
    """The tile with the mean colour of its valid pixels in place of the others, which the model cannot know."""
    if read.valid.all() or not read.valid.any():
        return read.rgb
    tile = read.rgb.copy()
    tile[~read.valid] = np.rint(read.rgb[read.valid].mean(axis=0))
    return tile


def _answers(response: PerceiveResponse, task: Task) -> int:
    return len({"caption": response.captions, "vqa": response.vqa, "classify": response.classes}[task])


def _checked_question(question: str) -> str:
    text = " ".join(question.split())
    if not text:
        raise InputError("The question is empty; ask one question about what is visible.")
    if len(text) > MAX_TEXT:
        raise InputError(f"The question has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text


def _checked_labels(labels: Sequence[str]) -> list[str]:
    """Trimmed labels without repeats; none is fine and means the model's own classes."""
    checked = list(dict.fromkeys(" ".join(label.split()) for label in labels))
    if not checked:
        return []
    if len(checked) == 1 and checked != [""]:
        raise InputError("One label leaves nothing to choose; give at least two, or none for the model's own classes.")
    if len(checked) > MAX_LABELS:
        raise InputError(f"There are {len(checked)} labels; at most {MAX_LABELS} are allowed.")
    for label in checked:
        if not 1 <= len(label) <= MAX_LABEL_LENGTH:
            raise InputError(f"A label has 1 to {MAX_LABEL_LENGTH} characters; {label[:40]!r} has {len(label)}.")
    return checked


def _elapsed(started: float) -> float:
    return round(time.perf_counter() - started, 4)
