"""The tools: from an image's name to a typed answer.

Each tool checks its inputs, describes the scene, plans looks at the region, has the model answer each of them, and
reduces the answers to one. Raster work runs in worker threads, so that one event loop serves many callers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from model_server.protocol import (
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    MAX_TEXT,
    PerceiveRequest,
    PerceiveResponse,
    TileCaption,
    TileClasses,
    TileVqa,
)
from rs_tools.errors import DeadlinePassed, InputError, PerceptionError, ServerError
from rs_tools.imagery.access import AccessPolicy, Source, Stamp, stamp_of
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import OVERLAP, Looks, look_at_whole, look_closely, look_once
from rs_tools.looking import OutOfTime, Progress, Seen, stream
from rs_tools.reduction import Scope, question_scope, reduce_answers, reduce_captions, reduce_classes
from rs_tools.results import (
    Alternative,
    Band,
    CaptionPart,
    CaptionResult,
    ClassifyResult,
    ClassPart,
    ClassScore,
    Evidence,
    InspectResult,
    ListedImage,
    ListResult,
    Provenance,
    Result,
    TileGrid,
    VqaResult,
)
from rs_tools.summary import headline

DEADLINE_S = 900.0
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


_A = TypeVar("_A")
_R = TypeVar("_R", bound=Result)


@dataclass
class _Call:
    """One question about a region: what is looked at, and what the model's answers came with."""

    scene: Scene
    looks: Looks
    started: float
    response: PerceiveResponse | None = None
    said: dict[str, None] = field(default_factory=dict)  # the server's warnings, each once, in order

    def heard(self, response: PerceiveResponse) -> None:
        self.response = response
        self.said |= dict.fromkeys(response.warnings)


class Tools:
    """Caption, question and class of an image's region, and two helpers, as async functions.

    Every method raises a `PerceptionError` with text for the caller: AccessError (not an allowed file), ImageError
    (not a readable raster), RegionError, InputError, DeadlinePassed, and of the model server ServerBusy,
    ServerUnavailable, ServerError. `image` is a path under an allowed root. `region` is [x1, y1, x2, y2] in pixels,
    empty for the whole image. `bands` are one (grey) or three (red, green, blue) band numbers, empty lets the file
    decide. `progress` is told, plainly or async, how many looks at the region are done, of how many, and that in words.

    A region beyond one look's size is looked at many times; `imagery.tiling` says at which scales, `reduction` how the
    answers become one. Cancelling a call ends its reading and asking.

    Args:
        policy: which files may be read.
        client: the way to the model server.
        deadline_s: the time for one call, in seconds; beyond it the call ends with what was found by then.
    """

    def __init__(self, policy: AccessPolicy, client: Perceiving, deadline_s: float = DEADLINE_S) -> None:
        self._policy = policy
        self._client = client
        self._deadline_s = deadline_s
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
        progress: Progress | None = None,
    ) -> CaptionResult:
        """Describe what a region shows, in one sentence (`short`) or more (`full`).

        Of a large region: the caption of the whole, and after it what parts show beyond that.
        """
        if detail not in ("short", "full"):
            raise InputError(f"detail must be 'short' or 'full', not {detail!r}.")
        call = await self._call(image, region, bands, look_at_whole)
        request = PerceiveRequest(task="caption", detail=detail)
        return await self._answer(
            call, request, lambda response: response.captions, partial(_captioned, call, detail), progress
        )

    async def vqa(
        self,
        image: str,
        question: str,
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> VqaResult:
        """Answer a question about a region; abstains where the answer is not certain enough."""
        text = _checked_question(question)
        scope = question_scope(text)
        call = await self._call(image, region, bands, partial(_looks_for, scope))
        request = PerceiveRequest(task="vqa", text=text)
        return await self._answer(
            call, request, lambda response: response.vqa, partial(_answered, call, scope), progress
        )

    async def classify(
        self,
        image: str,
        labels: Sequence[str] = (),
        top_k: int = 5,
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> ClassifyResult:
        """Choose the class of a region among `labels`, or among the model's own classes where there are none."""
        checked = _checked_labels(labels)
        if not 1 <= top_k <= MAX_LABELS:
            raise InputError(f"top_k must be from 1 to {MAX_LABELS}, not {top_k}.")
        call = await self._call(image, region, bands, look_at_whole)
        request = PerceiveRequest(task="classify", labels=checked)
        return await self._answer(
            call, request, lambda response: response.classes, partial(_classified, call, top_k), progress
        )

    async def _call(
        self,
        image: str,
        region: Sequence[float],
        bands: Sequence[int],
        plan: Callable[[Region, float | None], Looks],
    ) -> _Call:
        started = time.perf_counter()

        def planned() -> _Call:
            scene = self._scene(image, bands)
            place = scene.georeference
            gsd_m = place.gsd_m(scene.width, scene.height) if place else None
            return _Call(scene, plan(scene.region(region), gsd_m), started)

        return await asyncio.to_thread(planned)

    async def _answer(
        self,
        call: _Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        reduce: Callable[[Seen[_A]], _R],
        progress: Progress | None,
    ) -> _R:
        """The answers that `pick` finds in the responses to all looks, reduced to one result."""

        async def ask(tiles: list[np.ndarray]) -> Sequence[_A]:
            response = await self._client.perceive(request, tiles)
            answers = pick(response)
            if len(answers) != len(tiles):
                raise ServerError(f"The model server did not answer each of the {len(tiles)} tiles; try again.")
            call.heard(response)
            return answers

        left = self._deadline_s - (time.perf_counter() - call.started)
        try:
            return reduce(await stream(call.scene, call.looks, ask, seconds=left, progress=progress))
        except OutOfTime as late:
            raise DeadlinePassed(_too_late(self._deadline_s, call.looks, late.seen, reduce)) from late

    def _scene(self, image: str, bands: Sequence[int]) -> Scene:
        """The scene of an image, kept while its file stays the same. Failures are not kept."""
        source = self._policy.resolve(image)
        key = (source, stamp_of(source), tuple(bands))
        scene = self._scenes.pop(key, None) or Scene.open(self._policy, str(source), bands)
        self._scenes[key] = scene  # now the most recently used
        while len(self._scenes) > _SCENES_KEPT:
            self._scenes.popitem(last=False)
        return scene

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


def _looks_for(scope: Scope, region: Region, gsd_m: float | None) -> Looks:
    """What answers a question: see the table in `reduction`."""
    match scope:
        case "presence":
            return look_closely(region, gsd_m, overview=True, overlap=OVERLAP)
        case "count" | "area":
            return look_closely(region, gsd_m, overview=False, overlap=0)
        case "once":
            return look_once(region)
        case "whole":
            return look_at_whole(region, gsd_m)


def _captioned(call: _Call, detail: Literal["short", "full"], seen: Seen[TileCaption]) -> CaptionResult:
    looks = seen.looks
    if not looks:
        return CaptionResult(caption=_NO_DATA, parts=[], confidence=0, **_common(call, seen))
    found = reduce_captions(looks, detail)
    return CaptionResult(
        caption=found.caption,
        parts=[CaptionPart(region=list(part.region), caption=part.answer.caption) for part in found.parts],
        confidence=found.confidence,
        **_common(call, seen),
    )


def _answered(call: _Call, scope: Scope, seen: Seen[TileVqa]) -> VqaResult:
    looks = seen.looks
    if not looks:
        return VqaResult(
            answer=_NO_DATA, kind="text", confidence=0, abstained=True, alternatives=[], evidence=[],
            **_common(call, seen),
        )  # fmt: skip
    found = reduce_answers(scope, looks)
    return VqaResult(
        answer=found.answer,
        kind=found.kind,
        confidence=found.confidence,
        abstained=found.abstained,
        alternatives=[Alternative(answer=answer, confidence=share) for answer, share in found.alternatives],
        evidence=[
            Evidence(region=list(look.region), answer=look.answer.answer, confidence=look.answer.confidence)
            for look in found.evidence
        ],
        **_common(call, seen, found.warnings),
    )


def _classified(call: _Call, top_k: int, seen: Seen[TileClasses]) -> ClassifyResult:
    looks = seen.looks
    if not looks:
        return ClassifyResult(label="", score=0, top=[], **_common(call, seen))
    top = _ranked(reduce_classes(looks))
    parts = [ClassPart(region=list(look.region), **_ranked(reduce_classes([look]))[0]) for look in looks]
    return ClassifyResult(
        **top[0],
        top=[ClassScore(**one) for one in top[:top_k]],
        parts=parts if len(parts) > 1 else [],
        **_common(call, seen),
    )


def _ranked(scores: dict[str, float]) -> list[dict]:
    """`label` and `score` of each class, best first."""
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])
    return [{"label": label, "score": min(1.0, score)} for label, score in ranked]


def _too_late(deadline_s: float, looks: Looks, seen: Seen[_A], reduce: Callable[[Seen[_A]], Result]) -> str:
    """What was done until the deadline, and how to get the rest."""
    text = f"The {deadline_s:g} s for one call are over after {seen.done} of {seen.total} looks; the rest is cancelled."
    if seen.looks:
        text += f" So far: {headline(reduce(seen))}."
    if seen.total > 1:
        rest, _ = looks.windows[seen.done]
        end = looks.finest.regions[-1]
        text += f" Ask about a smaller region; what was not looked at begins at row {rest[1]} and ends at row {end[3]}."
    return text


def _common(call: _Call, seen: Seen, reduced: Sequence[str] = ()) -> dict:
    """The fields that every answer about a region carries. `reduced`: warnings of the reduction."""
    provenance = _scene_provenance(call.scene, call.started)
    plan = call.looks.finest
    provenance.tile_grid = TileGrid(
        columns=plan.columns,
        rows=plan.rows,
        tile_width=plan.tile_size[0],
        tile_height=plan.tile_size[1],
        decimation=plan.decimation,
        overlap=plan.overlap,
        overview=call.looks.parts is not None and call.looks.overview is not None,
    )
    if call.response is not None:
        provenance.model = call.response.model.model
        provenance.weights_digest = call.response.model.weights_digest
        provenance.attention_backend = call.response.model.attention_backend
        provenance.precision = call.response.model.precision
        provenance.task_token = call.response.task_token
        provenance.expert = call.response.expert
    return {
        "georeferenced": call.scene.georeference is not None,
        "warnings": [*call.scene.warnings, *_look_warnings(call.scene, call.looks, seen), *reduced, *call.said],
        "provenance": provenance,
    }


def _scene_provenance(scene: Scene, started: float) -> Provenance:
    return Provenance(
        image_digest=scene.digest,
        bands=list(scene.choice.indexes),
        stretch=str(scene.stretch),
        elapsed_s=_elapsed(started),
    )


def _look_warnings(scene: Scene, looks: Looks, seen: Seen) -> list[str]:
    if seen.valid == 0:
        return [_NO_DATA]
    warnings = []
    if scene.modality in _MODALITY_WARNINGS:
        warnings.append(f"{_MODALITY_WARNINGS[scene.modality]} (Guessed: {scene.modality_reason}.)")
    if seen.valid < 0.5:
        warnings.append(f"Only {seen.valid:.1%} of the region holds data.")
    if seen.one_color:
        warnings.append("The region is of one uniform colour; there is little to see in it.")
    plan = looks.finest
    if looks.coarsened:
        warnings.append(
            f"The region would take {looks.coarsened} looks at the scale meant for this question; it got "
            f"{len(plan.regions)}, reduced {plan.decimation:.1f}-fold, so small objects may be missed. Ask about "
            "smaller regions for details."
        )
    elif plan.decimation >= _HEAVY_DECIMATION:
        warnings.append(
            f"The region was reduced {plan.decimation:.1f}-fold for the model; small objects are lost and counts are "
            "too low. Ask about a smaller region for details."
        )
    return warnings


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
