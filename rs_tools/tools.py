"""The tools: from an image's name to a typed answer.

Each tool checks its inputs, has the scene described and looks at the region planned (`scenes`), has the model answer
each of them (`asking`), and reduces the answers to one. Raster work runs in worker threads, so that one event loop
serves many callers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model_server.protocol import (
    MAX_LABELS,
    PerceiveRequest,
    PerceiveResponse,
    TileMasks,
    TileObjects,
)
from model_server.relations import parse
from rs_tools.amounts import Amount, asked_amount
from rs_tools.asking import Asker, Perceiving
from rs_tools.calls import Call, Output
from rs_tools.errors import ArtifactError, InputError, RegionError
from rs_tools.geometry.extents import pixels_within
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.tiling import look_at_whole, look_densely
from rs_tools.inputs import checked_classes, checked_labels, checked_phrase, checked_question
from rs_tools.inspecting import inspection, listing
from rs_tools.looking import Progress, Seen
from rs_tools.reduction import question_scope
from rs_tools.results import (
    CaptionResult,
    ClassifyResult,
    DetectChangeResult,
    GroundResult,
    InspectResult,
    ListResult,
    SegmentResult,
    VqaResult,
)
from rs_tools.scenes import Scenes
from rs_tools.user_folder import artifacts_folder, make_user_folder
from rs_tools.wording import answered, captioned, classified, looks_for

if TYPE_CHECKING:  # what makes boxes and masks is imported when one is asked for: the tools must start fast
    from rs_tools.artifacts.store import ArtifactStore
    from rs_tools.grounding import Found
    from rs_tools.painting import Painted

DEADLINE_S = 900.0
MAX_OBJECTS = 1000


class Tools:
    """Words, boxes, masks and change of an image's region, and two helpers, as async functions.

    Every method raises a `PerceptionError` with text for the caller: AccessError (not an allowed file), ImageError
    (not a readable raster), RegionError, InputError, PairError, ArtifactError, DeadlinePassed, and of the model server
    ServerBusy, ServerUnavailable, ServerError. `image` is a path under an allowed root. `region` is [x1, y1, x2, y2] in
    pixels, empty for the whole image. `bands` are one (grey) or three (red, green, blue) band numbers, empty lets the
    file decide. `embeddings` is a raster of AlphaEarth embeddings, or a folder of those of one year, for a model that
    is modulated by them; empty for none. `progress` is told, plainly or async, how many looks at the region are done,
    of how many, and that in words.

    A region beyond one look's size is looked at many times; `imagery.tiling` says at which scales, `reduction` how the
    answers become one. Cancelling a call ends its reading and asking.

    Args:
        policy: which files may be read.
        client: the way to the model server.
        deadline_s: the time for one call, in seconds; beyond it the call ends with what was found by then.
        artifacts: folder for the files of answers, of its own; None: one in this user's cache.
    """

    def __init__(
        self,
        policy: AccessPolicy,
        client: Perceiving,
        deadline_s: float = DEADLINE_S,
        artifacts: str | Path | None = None,
    ) -> None:
        self._policy = policy
        self._scenes = Scenes(policy)
        self._model = Asker(client, deadline_s)
        self._artifacts = artifacts
        self._kept_store: ArtifactStore | None = None

    async def inspect_image(self, image: str, bands: Sequence[int] = ()) -> InspectResult:
        """Size, bands, data type, georeference and kind of an image. Asks no model."""
        started = time.perf_counter()
        scene = await asyncio.to_thread(self._scenes.scene, image, bands)
        return await asyncio.to_thread(inspection, scene, started)

    async def region_of(self, image: str, bounds: Sequence[float]) -> list[float]:
        """The region of an image that shows a place, [west, south, east, north] in WGS84 degrees, as far as it does.

        Raises RegionError also where the image has no known place.
        """
        scene = await asyncio.to_thread(self._scenes.scene, image, ())
        if scene.georeference is None:
            raise RegionError(f"{scene.source.name} has no known place on Earth; give its region in pixels.")
        return pixels_within(scene.georeference, scene.width, scene.height, bounds)

    async def list_images(self, folder: str = "") -> ListResult:
        """The readable images below a folder (empty: below all allowed folders), at most `inspecting.MAX_LISTED`."""
        return await asyncio.to_thread(listing, self._policy, folder)

    async def caption(
        self,
        image: str,
        region: Sequence[float] = (),
        detail: Literal["short", "full"] = "short",
        bands: Sequence[int] = (),
        embeddings: str = "",
        progress: Progress | None = None,
    ) -> CaptionResult:
        """Describe what a region shows, in one sentence (`short`) or more (`full`).

        Of a large region: the caption of the whole, and after it what parts show beyond that.
        """
        if detail not in ("short", "full"):
            raise InputError(f"detail must be 'short' or 'full', not {detail!r}.")
        call = await self._scenes.call(image, region, bands, look_at_whole, embeddings)
        request = PerceiveRequest(task="caption", detail=detail, gsd_m=call.tile_gsd_m)
        return await self._model.answer(
            call, request, lambda response: response.captions, partial(captioned, call, detail), progress
        )

    async def vqa(
        self,
        image: str,
        question: str,
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        embeddings: str = "",
        progress: Progress | None = None,
    ) -> VqaResult:
        """Answer a question about a region; abstains where the answer is not certain enough.

        How many there are of a thing, or how much ground it covers, is read off boxes or a mask where the model knows
        the thing; the answer's evidence says so and its artifacts hold them.
        """
        text = checked_question(question)
        scope = question_scope(text)
        amount = asked_amount(text)
        if amount is not None and (found := await self._amount(amount, image, region, bands, embeddings, progress)):
            return found
        call = await self._scenes.call(image, region, bands, partial(looks_for, scope), embeddings)
        request = PerceiveRequest(task="vqa", text=text, gsd_m=call.tile_gsd_m)
        return await self._model.answer(
            call, request, lambda response: response.vqa, partial(answered, call, scope), progress
        )

    async def classify(
        self,
        image: str,
        labels: Sequence[str] = (),
        top_k: int = 5,
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        embeddings: str = "",
        progress: Progress | None = None,
    ) -> ClassifyResult:
        """Choose the class of a region among `labels`, or among the model's own classes where there are none."""
        checked = checked_labels(labels)
        if not 1 <= top_k <= MAX_LABELS:
            raise InputError(f"top_k must be from 1 to {MAX_LABELS}, not {top_k}.")
        call = await self._scenes.call(image, region, bands, look_at_whole, embeddings)
        request = PerceiveRequest(task="classify", labels=checked, gsd_m=call.tile_gsd_m)
        return await self._model.answer(
            call, request, lambda response: response.classes, partial(classified, call, top_k), progress
        )

    async def ground(
        self,
        image: str,
        query: str,
        region: Sequence[float] = (),
        max_objects: int = 100,
        min_score: float = 0.0,
        bands: Sequence[int] = (),
        preview: bool = False,
        embeddings: str = "",
        progress: Progress | None = None,
    ) -> GroundResult:
        """Find everything that a phrase names: boxes in pixels and on Earth, with calibrated scores.

        `max_objects` are listed, the best; `count` and the vectors file tell of all. `min_score` 0 leaves it to the
        model from which score on objects are worth giving.
        """
        phrase = checked_phrase(query, "query")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise InputError(f"max_objects must be from 1 to {MAX_OBJECTS}, not {max_objects}.")
        if not 0 <= min_score <= 1:
            raise InputError(f"min_score must be from 0 (the model's own threshold) to 1, not {min_score}.")
        call = await self._scenes.call(image, region, bands, look_densely, embeddings)
        result, _ = await self._ground(call, phrase, max_objects, min_score, preview, progress)
        return result

    async def _ground(
        self, call: Call, phrase: str, max_objects: int, min_score: float, preview: bool, progress: Progress | None
    ) -> tuple[GroundResult, Found]:
        from rs_tools import grounding

        relation = parse(phrase)  # which one of them is meant shows in the scene, not in a tile

        def reduce(seen: Seen[TileObjects]) -> GroundResult:
            found = grounding.found_in(call, seen, min_score, relation)
            return grounding.grounded(call, phrase, max_objects, found, seen)

        request = _ground_request(call, relation.head if relation else phrase)
        seen = await self._model.seen(call, request, _objects, reduce, progress)

        def finish() -> tuple[GroundResult, Found]:
            found = grounding.found_in(call, seen, min_score, relation)
            result = grounding.grounded(call, phrase, max_objects, found, seen)
            if seen.valid:
                result.artifacts = grounding.written(call, Output(self._store(), preview), phrase, found, result)
            return result, found

        return await asyncio.to_thread(finish)

    async def segment(
        self,
        image: str,
        classes: Sequence[str],
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        preview: bool = False,
        progress: Progress | None = None,
    ) -> SegmentResult:
        """Give each pixel one of the classes or none: pixels, share and area of each, a mask and its outlines."""
        checked = checked_classes(classes)
        call = await self._scenes.call(image, region, bands, look_densely)
        result, _ = await self._segment(call, checked, preview, progress)
        return result

    async def _segment(
        self, call: Call, checked: list[str], preview: bool, progress: Progress | None
    ) -> tuple[SegmentResult, Painted | None]:
        from rs_tools import painting, segmenting

        store = await asyncio.to_thread(self._store)
        painter, knowledge = painting.Painter(store, call, checked), segmenting.Knowledge()
        reduce = partial(segmenting.segmented, call, checked, painter, knowledge)
        seen, painted = await self._model.painted(
            call, _segment_request(call, checked), _masks, knowledge.maps, painter,
            lambda seen: reduce(seen, None), progress,
        )  # fmt: skip

        def finish() -> tuple[SegmentResult, Painted | None]:
            result = reduce(seen, painted)
            if painted is not None:
                result.artifacts = segmenting.written(call, Output(store, preview), checked, painted, result)
            return result, painted

        return await asyncio.to_thread(finish)

    async def detect_change(
        self,
        before: str,
        after: str,
        query: str = "",
        region: Sequence[float] = (),
        bands: Sequence[int] = (),
        preview: bool = False,
        progress: Progress | None = None,
    ) -> DetectChangeResult:
        """What changed between two images of one place: a mask, regions, area and a caption.

        `region` and all answers are in pixels of `before`, on whose grid `after` is laid. `query` may name the kind of
        change that is asked for.

        Raises:
            PairError: the two do not overlap, measure different things, or only one has a place on Earth.
        """
        phrase = checked_phrase(query, "query") if query.strip() else ""
        call = await self._scenes.pair_call(before, after, region, bands)
        from rs_tools import changing, painting

        assert call.pair is not None
        shift = await asyncio.to_thread(call.pair.shift)
        store = await asyncio.to_thread(self._store)
        painter = painting.Painter(store, call, changing.CLASSES)
        request = PerceiveRequest(task="detect_change", text=phrase, gsd_m=call.tile_gsd_m, modality=call.modality)
        seen, painted = await self._model.painted(
            call, request, lambda response: response.changes, changing.maps, painter,
            lambda seen: changing.detected(call, painter, seen, None, shift, (), phrase), progress,
        )  # fmt: skip
        scenes = await self._model.scene_captions(call) if painted is not None and painted.areas else []

        def finish() -> DetectChangeResult:
            result = changing.detected(call, painter, seen, painted, shift, scenes, phrase)
            if painted is not None:
                result.artifacts = changing.written(call, Output(store, preview), painted, result)
            return result

        return await asyncio.to_thread(finish)

    async def read_artifact(self, uri: str) -> bytes:
        """The content of a file that an answer refers to.

        Raises:
            ArtifactError: no such file (any more), or too large to hand over.
        """
        return await asyncio.to_thread(lambda: self._store().read(uri))

    async def _amount(
        self,
        amount: Amount,
        image: str,
        region: Sequence[float],
        bands: Sequence[int],
        embeddings: str,
        progress: Progress | None,
    ) -> VqaResult | None:
        """The answer from boxes or a mask; None where the model does not know the thing or the place has no area."""
        call = await self._scenes.call(image, region, bands, look_densely, embeddings)
        if amount.kind == "area" and call.scene.georeference is None:
            return None
        request = _ground_request(call, amount.phrase)
        if amount.kind == "area":
            request = _segment_request(call, [amount.phrase])
        if not await self._model.knows(request):
            return None
        from rs_tools import evidence

        if amount.kind == "count":
            boxes, found = await self._ground(call, amount.phrase, MAX_OBJECTS, 0.0, False, progress)
            return evidence.counted(amount.phrase, call.region, boxes, found) if boxes.artifacts else None
        mask, painted = await self._segment(call, [amount.phrase], False, progress)
        return None if painted is None else evidence.covered(amount.phrase, call.region, mask, painted)

    def _store(self) -> ArtifactStore:
        """The folder of artifacts, made when it is first needed."""
        if self._kept_store is None:
            from rs_tools.artifacts.store import ArtifactStore

            if self._artifacts is None:
                try:
                    make_user_folder()
                except OSError as error:
                    raise ArtifactError(
                        f"The folder for files of answers cannot be made: {error.strerror} ({error.filename}). Name "
                        "one for artifacts, or set RS_PERCEPTION_STATE to a folder that you own."
                    ) from error
            self._kept_store = ArtifactStore(self._artifacts or artifacts_folder())
        return self._kept_store


def _ground_request(call: Call, phrase: str) -> PerceiveRequest:
    return PerceiveRequest(task="ground", text=phrase, gsd_m=call.tile_gsd_m, modality=call.modality)


def _segment_request(call: Call, classes: Sequence[str]) -> PerceiveRequest:
    return PerceiveRequest(task="segment", labels=list(classes), gsd_m=call.tile_gsd_m, modality=call.modality)


def _objects(response: PerceiveResponse) -> list[TileObjects]:
    return response.objects


def _masks(response: PerceiveResponse) -> list[TileMasks]:
    return response.masks
