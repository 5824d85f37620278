"""One call of a tool: what is looked at, and what every answer says of how it was made."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model_server.protocol import Modality, PerceiveResponse
from rs_tools.imagery.alignment import Pair
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import Looks
from rs_tools.looking import Seen
from rs_tools.results import Provenance, TileGrid

if TYPE_CHECKING:
    from rs_tools.artifacts.store import ArtifactStore
    from rs_tools.imagery.anchors import Knowledge

NO_DATA = "The region holds no data: every pixel in it is nodata."
NO_OVERLAP = "Nothing in the region can be compared: it is nodata, or the later image does not cover it."
_HEAVY_DECIMATION = 4
_SPECK = 2  # pixels a side
_MODALITY_WARNINGS = {
    "multispectral": "The image is multispectral; the model saw only the three bands shown as red, green and blue.",
    "sar": "The image looks like radar (SAR); the model was trained on optical images, so its answer is unreliable.",
    "elevation": "The image looks like elevation, not a picture; the model's answer is unreliable.",
    "classified": "The image is a map of classes, not a picture; the model's answer is unreliable.",
    "grayscale": "The image has one grey band; the model was trained on colour images, so its answer is less reliable.",
    "unknown": "It is not clear what the image's bands measure; the model was trained on optical colour images.",
}
_RADAR_LEARNED = (
    "The image looks like radar (SAR). There the model has learned ships, oil slicks and their look-alikes at sea; "
    "what it says of anything else is unreliable."
)


@dataclass
class Call:
    """One question about a region.

    Attributes:
        scene: what is looked at; of a pair the earlier one, whose pixels are the grid.
        pair: of a comparison.
        looks: at which windows.
        started: `time.perf_counter()` when the call came.
        dense: boxes or masks are asked for.
        known: embeddings of the place, where the caller named some.
        response: the model's last one.
        said: the model server's warnings, each once, in order.
        in_degrees: what the region would be if degrees were meant.
    """

    scene: Scene
    looks: Looks
    started: float
    pair: Pair | None = None
    dense: bool = False
    known: Knowledge | None = None
    response: PerceiveResponse | None = None
    said: dict[str, None] = field(default_factory=dict)
    in_degrees: str = ""

    def heard(self, response: PerceiveResponse) -> None:
        self.response = response
        self.said |= dict.fromkeys(response.warnings)

    @property
    def region(self) -> Region:
        """What all looks together cover."""
        x1, y1, x2, y2 = zip(*self.looks.finest.regions, strict=True)
        return min(x1), min(y1), max(x2), max(y2)

    @property
    def gsd_m(self) -> float | None:
        """Metres per pixel in the middle of the region, or None where they are unknown."""
        return gsd_m_of(self.scene, self.region)

    @property
    def across_m(self) -> float | None:
        """Metres that a pixel there is wide, which need not be as many as it is high; None where they are unknown."""
        place = self.scene.georeference
        sides = place.pixel_m(self.region) if place else None
        return sides[0] if sides else None

    @property
    def tile_gsd_m(self) -> float | None:
        """Metres per pixel of a tile as the model sees it."""
        gsd_m = self.gsd_m
        return None if gsd_m is None else gsd_m * self.looks.finest.decimation

    @property
    def modality(self) -> Modality:
        scenes = (self.scene,) if self.pair is None else (self.pair.before, self.pair.after)
        return "sar" if any(scene.modality == "sar" for scene in scenes) else "optical"


@dataclass(frozen=True)
class Output:
    """Where the files of an answer go, and whether a picture of it is asked for."""

    store: ArtifactStore
    preview: bool = False


def gsd_m_of(scene: Scene, region: Region) -> float | None:
    """Metres per pixel in the middle of a region; None where they are unknown or are none."""
    place = scene.georeference
    gsd_m = place.gsd_m(region) if place else None
    return gsd_m if gsd_m and math.isfinite(gsd_m) else None


def common(call: Call, seen: Seen, reduced: Sequence[str] = ()) -> dict:
    """The fields that every answer about a region carries. `reduced`: warnings of the reduction."""
    provenance = scene_provenance(call.scene, call.started)
    if call.pair is not None:
        later = call.pair.after
        provenance.image_digest += f" {later.digest}"
        if str(later.stretch) != provenance.stretch:
            provenance.stretch += f"; later image: {later.stretch}"
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
    if call.known is not None:
        provenance.embeddings = call.known.described
    if call.response is not None:
        provenance.model = call.response.model.model
        provenance.weights_digest = call.response.model.weights_digest
        provenance.attention_backend = call.response.model.attention_backend
        provenance.precision = call.response.model.precision
        provenance.task_token = call.response.task_token
        provenance.expert = call.response.expert
    return {
        "georeferenced": call.scene.georeference is not None,
        "warnings": list(dict.fromkeys([*_scene_warnings(call), *_look_warnings(call, seen), *reduced, *call.said])),
        "provenance": provenance,
    }


def scene_provenance(scene: Scene, started: float) -> Provenance:
    return Provenance(
        image_digest=scene.digest,
        bands=list(scene.choice.indexes),
        stretch=str(scene.stretch),
        placement=scene.placement,
        elapsed_s=elapsed(started),
    )


def elapsed(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def _scene_warnings(call: Call) -> list[str]:
    if call.pair is None:
        return [*call.scene.warnings, *(call.known.warnings if call.known else ())]
    return [*call.pair.before.warnings, *call.pair.after.warnings, *call.pair.warnings]


def _look_warnings(call: Call, seen: Seen) -> list[str]:
    scene, looks = call.scene, call.looks
    if seen.valid == 0:
        return [NO_DATA if call.pair is None else NO_OVERLAP]
    warnings = []
    if scene.modality in _MODALITY_WARNINGS:
        learned = scene.modality == "sar" and call.dense and call.pair is None
        told = _RADAR_LEARNED if learned else _MODALITY_WARNINGS[scene.modality]
        warnings.append(f"{told} (Guessed: {scene.modality_reason}.)")
    if seen.valid < 0.5:
        holds = "holds data" if call.pair is None else "holds data in both images"
        warnings.append(f"Only {seen.valid:.1%} of the region {holds}.")
    if seen.one_color:
        warnings.append("The region is of one uniform colour; there is little to see in it.")
    x1, y1, x2, y2 = call.region
    if max(x2 - x1, y2 - y1) <= _SPECK < max(scene.width, scene.height):
        size = f"{x2 - x1} x {y2 - y1}"
        warnings.append(f"The region is {size} pixels; regions are in pixels, not in degrees.{call.in_degrees}")
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
