"""The images that calls are about: opened once, kept while their files stay the same, and planned looks at."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rs_tools.calls import Call, gsd_m_of
from rs_tools.imagery.access import AccessPolicy, Source, Stamp, stamp_of
from rs_tools.imagery.alignment import Pair
from rs_tools.imagery.beside import states_beside
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import Looks, look_densely

if TYPE_CHECKING:
    from rs_tools.imagery.anchors import Knowledge

_KEPT = 32


class Scenes:
    """Scenes by name, and calls about them. Arguments are as `Tools` explains them.

    Args:
        policy: which files may be read.
    """

    def __init__(self, policy: AccessPolicy) -> None:
        self._policy = policy
        self._kept: OrderedDict[tuple[Source, Stamp, tuple, tuple[int, ...]], Scene] = OrderedDict()

    def scene(self, image: str, bands: Sequence[int]) -> Scene:
        """The scene of an image, kept while its file and those beside it stay the same. Failures are not kept."""
        source = self._policy.resolve(image)
        key = (source, stamp_of(source), states_beside(source), tuple(bands))
        scene = self._kept.pop(key, None) or Scene.open(self._policy, str(source), bands)
        self._kept[key] = scene  # now the most recently used
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return scene

    async def call(
        self,
        image: str,
        region: Sequence[float],
        bands: Sequence[int],
        plan: Callable[[Region, float | None], Looks],
        embeddings: str = "",
    ) -> Call:
        """A call about a region, looked at as `plan` says for it and the scene's metres per pixel."""
        started = time.perf_counter()

        def planned() -> Call:
            scene = self.scene(image, bands)
            checked = scene.region(region)
            looks = plan(checked, gsd_m_of(scene, checked))
            known, in_degrees = self._known(embeddings, scene, region), scene.in_degrees(region)
            return Call(scene, looks, started, dense=plan is look_densely, known=known, in_degrees=in_degrees)

        return await asyncio.to_thread(planned)

    async def pair_call(self, before: str, after: str, region: Sequence[float], bands: Sequence[int]) -> Call:
        """A call that compares two images in a region of the earlier one.

        Raises:
            PairError: they cannot be compared.
        """
        started = time.perf_counter()

        def planned() -> Call:
            earlier = self.scene(before, bands)
            checked = earlier.region(region)
            looks = look_densely(checked, gsd_m_of(earlier, checked))
            pair = Pair.of(earlier, self.scene(after, bands))
            return Call(earlier, looks, started, pair, dense=True, in_degrees=earlier.in_degrees(region))

        return await asyncio.to_thread(planned)

    def _known(self, embeddings: str, scene: Scene, region: Sequence[float]) -> Knowledge | None:
        if not embeddings.strip():
            return None
        from rs_tools.imagery.anchors import Knowledge

        return Knowledge(self._policy, embeddings, scene, region)
