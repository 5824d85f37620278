"""Remote-sensing perception for scripts.

    import rs_tools

    scene = rs_tools.open("harbour.tif")
    print(scene.caption().caption)
    print((await scene.avqa("Is there a ship?")).answer)
    for ship in scene.ground("ship").objects:
        print(ship.score, ship.polygon_lonlat)

Each method of an `Image` has an async twin with an `a` before its name.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:  # importing rs_tools stays cheap; rasterio and httpx come with the first image
    from rs_tools.results import (
        CaptionResult,
        ClassifyResult,
        DetectChangeResult,
        GroundResult,
        InspectResult,
        SegmentResult,
        VqaResult,
    )
    from rs_tools.tools import Tools

__all__ = ["Image", "open"]

_Answer = TypeVar("_Answer")


def open(
    path: str | Path,
    bands: Sequence[int] = (),
    server: str | None = None,
    token: str | None = None,
    artifacts: str | Path | None = None,
) -> Image:
    """An image to ask about.

    Args:
        path: a raster file.
        bands: one (grey) or three (red, green, blue) band numbers; empty lets the file decide.
        server: URL of a model server; None finds or starts the local one.
        token: bearer token of `server`.
        artifacts: folder of its own for masks, outlines and previews; None is one in the user's cache.

    Raises:
        AccessError: the file's folder does not exist. A missing or damaged file is reported by the first question.
    """
    from rs_tools.imagery.access import AccessPolicy
    from rs_tools.tools import Tools

    def tools(*paths: Path) -> Tools:
        policy = AccessPolicy(sorted({path.parent for path in paths}))
        return Tools(policy, _client(server, token), artifacts=artifacts)

    real = Path(path).expanduser().resolve()
    return Image(tools, real, tuple(bands))


class Image:
    """One image and the questions it answers; `rs_tools.tools.Tools` says what they return and raise."""

    def __init__(self, tools: Callable[..., Tools], path: Path, bands: tuple[int, ...]) -> None:
        self._make_tools, self._file = tools, path
        self._tools, self._path, self._bands = tools(path), str(path), bands

    def inspect(self) -> InspectResult:
        """Size, bands, georeference and kind of the image."""
        return _submit(self._tools.inspect_image(self._path, self._bands)).result()

    async def ainspect(self) -> InspectResult:
        return await asyncio.wrap_future(_submit(self._tools.inspect_image(self._path, self._bands)))

    def caption(self, region: Sequence[float] = (), detail: Literal["short", "full"] = "short") -> CaptionResult:
        """What the region [x1, y1, x2, y2] (empty: the whole image) shows."""
        return _submit(self._tools.caption(self._path, region, detail, self._bands)).result()

    async def acaption(self, region: Sequence[float] = (), detail: Literal["short", "full"] = "short") -> CaptionResult:
        return await asyncio.wrap_future(_submit(self._tools.caption(self._path, region, detail, self._bands)))

    def vqa(self, question: str, region: Sequence[float] = ()) -> VqaResult:
        """The answer to a question about the region."""
        return _submit(self._tools.vqa(self._path, question, region, self._bands)).result()

    async def avqa(self, question: str, region: Sequence[float] = ()) -> VqaResult:
        return await asyncio.wrap_future(_submit(self._tools.vqa(self._path, question, region, self._bands)))

    def classify(self, labels: Sequence[str] = (), top_k: int = 5, region: Sequence[float] = ()) -> ClassifyResult:
        """The region's class among `labels`, or among the model's own classes."""
        return _submit(self._tools.classify(self._path, labels, top_k, region, self._bands)).result()

    async def aclassify(
        self, labels: Sequence[str] = (), top_k: int = 5, region: Sequence[float] = ()
    ) -> ClassifyResult:
        return await asyncio.wrap_future(_submit(self._tools.classify(self._path, labels, top_k, region, self._bands)))

    def ground(
        self,
        query: str,
        region: Sequence[float] = (),
        max_objects: int = 100,
        min_score: float = 0.0,
        preview: bool = False,
    ) -> GroundResult:
        """Boxes of everything that `query` names, in pixels and on Earth."""
        return _submit(self._ground(query, region, max_objects, min_score, preview)).result()

    async def aground(
        self,
        query: str,
        region: Sequence[float] = (),
        max_objects: int = 100,
        min_score: float = 0.0,
        preview: bool = False,
    ) -> GroundResult:
        return await asyncio.wrap_future(_submit(self._ground(query, region, max_objects, min_score, preview)))

    def segment(self, classes: Sequence[str], region: Sequence[float] = (), preview: bool = False) -> SegmentResult:
        """Which pixels are of which class: figures, a mask and its outlines."""
        return _submit(self._tools.segment(self._path, classes, region, self._bands, preview)).result()

    async def asegment(
        self, classes: Sequence[str], region: Sequence[float] = (), preview: bool = False
    ) -> SegmentResult:
        return await asyncio.wrap_future(
            _submit(self._tools.segment(self._path, classes, region, self._bands, preview))
        )

    def detect_change(
        self, after: str | Path, query: str = "", region: Sequence[float] = (), preview: bool = False
    ) -> DetectChangeResult:
        """What changed from this image to the later one at `after`; all in pixels of this image."""
        return _submit(self._change(after, query, region, preview)).result()

    async def adetect_change(
        self, after: str | Path, query: str = "", region: Sequence[float] = (), preview: bool = False
    ) -> DetectChangeResult:
        return await asyncio.wrap_future(_submit(self._change(after, query, region, preview)))

    def _ground(
        self, query: str, region: Sequence[float], max_objects: int, min_score: float, preview: bool
    ) -> Coroutine[Any, Any, GroundResult]:
        return self._tools.ground(self._path, query, region, max_objects, min_score, self._bands, preview)

    def _change(
        self, after: str | Path, query: str, region: Sequence[float], preview: bool
    ) -> Coroutine[Any, Any, DetectChangeResult]:
        later = Path(after).expanduser().resolve()
        both = self._make_tools(self._file, later)  # the later image may lie in another folder
        return both.detect_change(self._path, str(later), query, region, self._bands, preview)


def _submit(work: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
    return asyncio.run_coroutine_threadsafe(work, _Background.loop())


class _Background:
    """The event loop that owns the clients' connections, so that sync and async callers share them."""

    _lock = threading.Lock()
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def loop(cls) -> asyncio.AbstractEventLoop:
        with cls._lock:
            if cls._loop is None:
                cls._loop = asyncio.new_event_loop()
                threading.Thread(target=cls._loop.run_forever, name="rs_tools", daemon=True).start()
            return cls._loop


@cache
def _client(server: str | None, token: str | None) -> Any:
    from rs_tools.client import ModelClient

    return ModelClient(server, token)
