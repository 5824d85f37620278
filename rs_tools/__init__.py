"""Remote-sensing perception for scripts.

    import rs_tools as rs

    scene = rs.open("harbour.tif")
    print(scene.caption().caption)
    print((await scene.avqa("Is there a ship?")).answer)
    ships = scene.ground("ship")
    rs.to_geodataframe(ships).to_file("ships.gpkg")

Each method of an `Image` has an async twin with an `a` before its name. Processes forked from a script may go on with
its images.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

from rs_tools.conversion import to_dict, to_geodataframe, to_geojson
from rs_tools.forking import OfProcess

if TYPE_CHECKING:  # importing rs_tools stays cheap; rasterio and httpx come with the first image
    from rs_tools.client import ModelClient
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

__all__ = ["Image", "open", "to_dict", "to_geodataframe", "to_geojson"]

_Answer = TypeVar("_Answer")
_P = ParamSpec("_P")


def open(
    path: str | Path,
    bands: Sequence[int] = (),
    server: str | None = None,
    token: str | None = None,
    artifacts: str | Path | None = None,
    embeddings: str | Path | None = None,
) -> Image:
    """An image to ask about.

    Args:
        path: a raster file.
        bands: one (grey) or three (red, green, blue) band numbers; empty lets the file decide.
        server: URL of a model server; None finds or starts the local one.
        token: bearer token of `server`.
        artifacts: folder of its own for masks, outlines and previews; None is one in the user's cache.
        embeddings: raster of AlphaEarth embeddings of the place, or a folder of those of one year, for a model that is
            modulated by them; words, classes and boxes are then asked for with them.

    Raises:
        AccessError: an address, or the file's folder does not exist. A missing or damaged file is reported by the
            first question.
        InputError: `server` is no address, or `token` cannot be sent.
    """
    from rs_tools.imagery.access import AccessPolicy, refuse_address
    from rs_tools.tools import Tools

    def tools(*paths: Path) -> Tools:
        policy = AccessPolicy(sorted({path if path.is_dir() else path.parent for path in paths}))
        return Tools(policy, _client(server, token), artifacts=artifacts)

    refuse_address(path)
    real = Path(path).expanduser().resolve()
    return Image(tools, real, tuple(bands), Path(embeddings).expanduser().resolve() if embeddings else None)


def _waiting(
    method: Callable[Concatenate[Image, _P], Coroutine[Any, Any, _Answer]],
) -> Callable[Concatenate[Image, _P], _Answer]:
    """The sync twin of an async method: the same parameters, answer and errors, for callers without an event loop."""

    @wraps(method)
    def wait(self: Image, *args: _P.args, **kwargs: _P.kwargs) -> _Answer:
        answer = _submit(method(self, *args, **kwargs))
        try:
            return answer.result()
        finally:
            answer.cancel()  # of one that the caller interrupted; nothing happens to one that is done

    wait.__name__ = method.__name__.removeprefix("a")
    wait.__qualname__ = f"Image.{wait.__name__}"
    return wait


class Image:
    """One image and the questions it answers; `rs_tools.tools.Tools` says what they return and raise.

    `region` is [x1, y1, x2, y2] in pixels, empty for the whole image.
    """

    def __init__(
        self, tools: Callable[..., Tools], path: Path, bands: tuple[int, ...], embeddings: Path | None = None
    ) -> None:
        self._make_tools, self._file, self._path, self._bands = tools, path, str(path), bands
        self._embeddings = str(embeddings or "")
        self._own_tools = OfProcess(lambda: tools(path, embeddings) if embeddings else tools(path))

    @property
    def _tools(self) -> Tools:
        return self._own_tools.get()

    async def ainspect(self) -> InspectResult:
        """Size, bands, georeference and kind of the image."""
        return await _shared(self._tools.inspect_image(self._path, self._bands))

    async def aregion_of(self, bounds: Sequence[float]) -> list[float]:
        """The `region` that shows a place, [west, south, east, north] in WGS84 degrees, as far as the image does."""
        return await _shared(self._tools.region_of(self._path, bounds))

    async def acaption(self, region: Sequence[float] = (), detail: Literal["short", "full"] = "short") -> CaptionResult:
        """What the region shows, in words."""
        return await _shared(self._tools.caption(self._path, region, detail, self._bands, self._embeddings))

    async def avqa(self, question: str, region: Sequence[float] = ()) -> VqaResult:
        """The answer to a question about the region."""
        return await _shared(self._tools.vqa(self._path, question, region, self._bands, self._embeddings))

    async def aclassify(
        self, labels: Sequence[str] = (), top_k: int = 5, region: Sequence[float] = ()
    ) -> ClassifyResult:
        """The region's class among `labels`, or among the model's own classes."""
        return await _shared(self._tools.classify(self._path, labels, top_k, region, self._bands, self._embeddings))

    async def aground(
        self,
        query: str,
        region: Sequence[float] = (),
        max_objects: int = 100,
        min_score: float = 0.0,
        preview: bool = False,
    ) -> GroundResult:
        """Boxes of everything that `query` names, in pixels and on Earth."""
        return await _shared(
            self._tools.ground(
                self._path, query, region, max_objects, min_score, self._bands, preview, self._embeddings
            )
        )

    async def asegment(
        self, classes: Sequence[str], region: Sequence[float] = (), preview: bool = False
    ) -> SegmentResult:
        """Which pixels are of which class: figures, a mask and its outlines."""
        return await _shared(self._tools.segment(self._path, classes, region, self._bands, preview))

    async def adetect_change(
        self, after: str | Path, query: str = "", region: Sequence[float] = (), preview: bool = False
    ) -> DetectChangeResult:
        """What changed from this image to the later one at `after`; all in pixels of this image."""
        both, later = self._with(Path(after))
        return await _shared(both.detect_change(self._path, later, query, region, self._bands, preview))

    def _with(self, other: Path) -> tuple[Tools, str]:
        """Tools that may also read the other image, which may lie in another folder."""
        from rs_tools.imagery.access import refuse_address

        refuse_address(other)
        real = other.expanduser().resolve()
        return self._make_tools(self._file, real), str(real)

    inspect = _waiting(ainspect)
    region_of = _waiting(aregion_of)
    caption = _waiting(acaption)
    vqa = _waiting(avqa)
    classify = _waiting(aclassify)
    ground = _waiting(aground)
    segment = _waiting(asegment)
    detect_change = _waiting(adetect_change)


async def _shared(work: Coroutine[Any, Any, _Answer]) -> _Answer:
    """Work done on the loop that owns the connections, whichever loop waits for it."""
    return await asyncio.wrap_future(_submit(work))


def _submit(work: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
    return asyncio.run_coroutine_threadsafe(work, _Background.loop())


class _Background:
    """The event loop that owns the clients' connections, so that sync and async callers share them.

    One to a process: threads do not outlive a fork. A parent's loop is kept, for closing it would disturb the parent.
    """

    _lock = threading.Lock()
    _loops: ClassVar[dict[int, asyncio.AbstractEventLoop]] = {}

    @classmethod
    def loop(cls) -> asyncio.AbstractEventLoop:
        with cls._lock:
            if (process := os.getpid()) not in cls._loops:
                cls._loops[process] = asyncio.new_event_loop()
                threading.Thread(target=cls._loops[process].run_forever, name="rs_tools", daemon=True).start()
            return cls._loops[process]


def _client(server: str | None, token: str | None) -> ModelClient:
    return _client_of(os.getpid(), server, token)


@cache
def _client_of(process: int, server: str | None, token: str | None) -> ModelClient:
    """The client of a process."""
    from rs_tools.client import ModelClient

    return ModelClient(server, token)
