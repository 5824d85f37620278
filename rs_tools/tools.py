"""The tools: from an image's name to a typed answer.

Each tool checks its inputs, describes the scene, plans looks at the region, has the model answer each of them, and
reduces the answers to one. Raster work runs in worker threads, so that one event loop serves many callers.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np

from model_server.protocol import (
    MAX_LABELS,
    PerceiveRequest,
    PerceiveResponse,
    TileCaption,
    TileMasks,
    TileObjects,
)
from model_server.relations import parse
from rs_tools.amounts import Amount, asked_amount
from rs_tools.calls import Call, Output, scene_gsd_m
from rs_tools.errors import DeadlinePassed, InputError, NotServed, ServerError
from rs_tools.imagery.access import AccessPolicy, Source, Stamp, stamp_of
from rs_tools.imagery.alignment import Pair
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import Looks, look_at_whole, look_densely, single_tile
from rs_tools.inputs import checked_classes, checked_labels, checked_phrase, checked_question
from rs_tools.inspecting import inspection, listing
from rs_tools.looking import BATCH, OutOfTime, Progress, Seen, Taken, asked, shown, stream
from rs_tools.reduction import question_scope
from rs_tools.results import (
    CaptionResult,
    ClassifyResult,
    DetectChangeResult,
    GroundResult,
    InspectResult,
    ListResult,
    Result,
    SegmentResult,
    VqaResult,
)
from rs_tools.summary import headline
from rs_tools.user_folder import artifacts_folder
from rs_tools.wording import answered, captioned, classified, looks_for

if TYPE_CHECKING:  # what makes boxes and masks is imported when one is asked for: the tools must start fast
    from rs_tools.artifacts import ArtifactStore
    from rs_tools.grounding import Found
    from rs_tools.imagery.anchors import Knowledge
    from rs_tools.painting import Maps, Painted, Painter

DEADLINE_S = 900.0
MAX_OBJECTS = 1000
DENSE_BATCH = 4  # tiles, each four times as large as those for words, so that progress comes as often
_SCENES_KEPT = 32
_BLANK = 64  # pixels a side


class Perceiving(Protocol):
    """What the tools need of a `ModelClient`."""

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse: ...


_A = TypeVar("_A")
_R = TypeVar("_R", bound=Result)


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
        self._client = client
        self._deadline_s = deadline_s
        self._artifacts = artifacts
        self._kept_store: ArtifactStore | None = None
        self._scenes: OrderedDict[tuple[Source, Stamp, tuple[int, ...]], Scene] = OrderedDict()

    async def inspect_image(self, image: str, bands: Sequence[int] = ()) -> InspectResult:
        """Size, bands, data type, georeference and kind of an image. Asks no model."""
        started = time.perf_counter()
        scene = await asyncio.to_thread(self._scene, image, bands)
        return await asyncio.to_thread(inspection, scene, started)

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
        call = await self._call(image, region, bands, look_at_whole, embeddings)
        request = PerceiveRequest(task="caption", detail=detail, gsd_m=call.tile_gsd_m)
        return await self._answer(
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
        call = await self._call(image, region, bands, partial(looks_for, scope), embeddings)
        request = PerceiveRequest(task="vqa", text=text, gsd_m=call.tile_gsd_m)
        return await self._answer(
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
        call = await self._call(image, region, bands, look_at_whole, embeddings)
        request = PerceiveRequest(task="classify", labels=checked, gsd_m=call.tile_gsd_m)
        return await self._answer(
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
        call = await self._call(image, region, bands, look_densely, embeddings)
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
        seen = await self._seen(call, request, _objects, reduce, progress)

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
        call = await self._call(image, region, bands, look_densely)
        result, _ = await self._segment(call, checked, preview, progress)
        return result

    async def _segment(
        self, call: Call, checked: list[str], preview: bool, progress: Progress | None
    ) -> tuple[SegmentResult, Painted | None]:
        from rs_tools import painting, segmenting

        store = await asyncio.to_thread(self._store)
        painter, knowledge = painting.Painter(store, call, checked), segmenting.Knowledge()
        reduce = partial(segmenting.segmented, call, checked, painter, knowledge)
        seen, painted = await self._painted(
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
        call = await self._pair_call(before, after, region, bands)
        from rs_tools import changing, painting

        assert call.pair is not None
        shift = await asyncio.to_thread(call.pair.shift)
        store = await asyncio.to_thread(self._store)
        painter = painting.Painter(store, call, changing.CLASSES)
        request = PerceiveRequest(task="detect_change", text=phrase, gsd_m=call.tile_gsd_m, modality=call.modality)
        seen, painted = await self._painted(
            call, request, lambda response: response.changes, changing.maps, painter,
            lambda seen: changing.detected(call, painter, seen, None, shift, (), phrase), progress,
        )  # fmt: skip
        scenes = await self._scene_captions(call) if painted is not None and painted.areas else []

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

    async def _call(
        self,
        image: str,
        region: Sequence[float],
        bands: Sequence[int],
        plan: Callable[[Region, float | None], Looks],
        embeddings: str = "",
    ) -> Call:
        started = time.perf_counter()

        def planned() -> Call:
            scene = self._scene(image, bands)
            looks = plan(scene.region(region), scene_gsd_m(scene))
            return Call(
                scene, looks, started, dense=plan is look_densely, known=self._known(embeddings, scene, region)
            )

        return await asyncio.to_thread(planned)

    async def _pair_call(self, before: str, after: str, region: Sequence[float], bands: Sequence[int]) -> Call:
        started = time.perf_counter()

        def planned() -> Call:
            earlier = self._scene(before, bands)
            looks = look_densely(earlier.region(region), scene_gsd_m(earlier))
            return Call(earlier, looks, started, Pair.of(earlier, self._scene(after, bands)), dense=True)

        return await asyncio.to_thread(planned)

    async def _answer(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        reduce: Callable[[Seen[_A]], _R],
        progress: Progress | None,
    ) -> _R:
        """The answers that `pick` finds in the responses to all looks, reduced to one result."""
        return reduce(await self._seen(call, request, pick, reduce, progress))

    async def _seen(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        reduce: Callable[[Seen[_A]], Result],
        progress: Progress | None,
        take: Callable[[Sequence[Taken[_A]]], Awaitable[None]] | None = None,
    ) -> Seen[_A]:
        """The answers to all looks. `reduce` says what was found until the deadline; `take` as in `stream`."""

        known = call.known

        async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> Sequence[_A]:
            told = request
            if known is not None:
                anchors = await asyncio.to_thread(lambda at: [at(region) for region in regions], known.at)
                told = request.model_copy(update={"anchors": anchors})
            response = await self._client.perceive(told, tiles)
            answers = pick(response)
            wanted = len(tiles) // 2 if call.pair is not None else len(tiles)
            if len(answers) != wanted:
                raise ServerError(f"The model server did not answer each of the {wanted} tiles; try again.")
            call.heard(response)
            return answers

        try:
            return await stream(
                call.pair or call.scene, call.looks, ask, seconds=self._left(call), progress=progress,
                batch=DENSE_BATCH if call.dense else BATCH, take=take,
            )  # fmt: skip
        except OutOfTime as late:
            raise DeadlinePassed(_too_late(self._deadline_s, call.looks, late.seen, reduce)) from late

    async def _painted(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        maps: Callable[[_A], Maps],
        painter: Painter,
        reduce: Callable[[Seen[_A]], Result],
        progress: Progress | None,
    ) -> tuple[Seen[_A], Painted | None]:
        """All looks painted; None for the mask of a region without data."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="rs_tools-painter")
        loop = asyncio.get_running_loop()

        def paint(tiles: Sequence[Taken[_A]]) -> None:
            for tile in tiles:
                painter.add(tile.index, None if tile.answer is None else maps(tile.answer), tile.valid)

        async def take(tiles: Sequence[Taken[_A]]) -> None:
            try:
                await loop.run_in_executor(thread, paint, tiles)
            except ValueError as error:
                raise ServerError(f"The model server's maps do not fit the tiles it was sent: {error}.") from error

        try:
            seen = await self._seen(call, request, pick, reduce, progress, take)
            return seen, await loop.run_in_executor(thread, painter.finish) if seen.valid else None
        finally:
            thread.submit(painter.close)  # after what it is doing
            thread.shutdown(wait=False)

    async def _scene_captions(self, call: Call) -> Sequence[TileCaption]:
        """Of the earlier and the later scene of a pair, each from one look; none where no time is left for them."""

        def read() -> list[np.ndarray]:
            assert call.pair is not None
            plan = single_tile(call.region)
            with call.pair.reader() as reading:
                return list(shown(reading(call.region, plan.size(call.region))))

        async def ask(tiles: list[np.ndarray]) -> Sequence[TileCaption]:
            return (await self._client.perceive(PerceiveRequest(task="caption"), tiles)).captions

        try:
            async with asyncio.timeout(self._left(call)):
                return await asked(partial(ask, await asyncio.to_thread(read)), patient=True)
        except TimeoutError:  # the change itself is known, and worth more than words about the scenes
            return []

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
        call = await self._call(image, region, bands, look_densely, embeddings)
        if amount.kind == "area" and call.scene.georeference is None:
            return None
        request = _ground_request(call, amount.phrase)
        if amount.kind == "area":
            request = _segment_request(call, [amount.phrase])
        if not await self._knows(request):
            return None
        from rs_tools import evidence

        if amount.kind == "count":
            boxes, found = await self._ground(call, amount.phrase, MAX_OBJECTS, 0.0, False, progress)
            return evidence.counted(amount.phrase, call.region, boxes, found) if boxes.artifacts else None
        mask, painted = await self._segment(call, [amount.phrase], False, progress)
        return None if painted is None else evidence.covered(amount.phrase, call.region, mask, painted)

    async def _knows(self, request: PerceiveRequest) -> bool:
        """Whether the model knows what a request names, asked with a tile that shows nothing."""
        blank = np.full((_BLANK, _BLANK, 3), 127, np.uint8)
        try:
            response = await self._client.perceive(request, [blank])
        except NotServed:
            return False
        answers = [*(one.known for one in response.objects), *(known for one in response.masks for known in one.known)]
        return bool(answers) and all(answers)

    def _known(self, embeddings: str, scene: Scene, region: Sequence[float]) -> Knowledge | None:
        if not embeddings.strip():
            return None
        from rs_tools.imagery.anchors import Knowledge

        return Knowledge(self._policy, embeddings, scene, region)

    def _left(self, call: Call) -> float:
        return self._deadline_s - (time.perf_counter() - call.started)

    def _store(self) -> ArtifactStore:
        """The folder of artifacts, made when it is first needed."""
        if self._kept_store is None:
            from rs_tools.artifacts import ArtifactStore

            self._kept_store = ArtifactStore(self._artifacts or artifacts_folder())
        return self._kept_store

    def _scene(self, image: str, bands: Sequence[int]) -> Scene:
        """The scene of an image, kept while its file stays the same. Failures are not kept."""
        source = self._policy.resolve(image)
        key = (source, stamp_of(source), tuple(bands))
        scene = self._scenes.pop(key, None) or Scene.open(self._policy, str(source), bands)
        self._scenes[key] = scene  # now the most recently used
        while len(self._scenes) > _SCENES_KEPT:
            self._scenes.popitem(last=False)
        return scene


def _ground_request(call: Call, phrase: str) -> PerceiveRequest:
    return PerceiveRequest(task="ground", text=phrase, gsd_m=call.tile_gsd_m, modality=call.modality)


def _segment_request(call: Call, classes: Sequence[str]) -> PerceiveRequest:
    return PerceiveRequest(task="segment", labels=list(classes), gsd_m=call.tile_gsd_m, modality=call.modality)


def _objects(response: PerceiveResponse) -> list[TileObjects]:
    return response.objects


def _masks(response: PerceiveResponse) -> list[TileMasks]:
    return response.masks


def _too_late(deadline_s: float, looks: Looks, seen: Seen[_A], reduce: Callable[[Seen[_A]], Result]) -> str:
    """What was done until the deadline, and how to get the rest."""
    text = f"The {deadline_s:g} s for one call are over after {seen.done} of {seen.total} looks; the rest is cancelled."
    if seen.valid:
        text += f" So far: {headline(reduce(seen))}."
    if seen.total > 1:
        rest, _ = looks.windows[seen.done]
        end = looks.finest.regions[-1]
        text += f" Ask about a smaller region; what was not looked at begins at row {rest[1]} and ends at row {end[3]}."
    return text
