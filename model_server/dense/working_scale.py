"""At which scale the dense branch looks at a tile: pixels looked at per pixel of the tile.

A detector finds a thing best at the size on the screen at which it learned it. So each concept has working ground
sampling distances, and a tile whose pixels are known to be `gsd_m` metres is looked at with the scales
`gsd_m / working`, which vote (see scale_search). Where the ground sampling distance is unknown, objects are searched at
several scales; masks and change are looked at with those that suited such imagery best.

`BOXES`, `MASKS` and `CHANGE` were chosen by AP, IoU and F1 on the validation records, scales for objects of unknown
pixel size also on the same records reduced 2 to 8 times; they are to be chosen again when the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from model_server.protocol import Modality

_T = TypeVar("_T")

MAX_LOOK_PIXELS = 2048**2  # a larger look is made coarser: it would not fit a modest memory
SAME_SCALE = 1.25  # looks whose scales differ by less see the same
COARSE_RADAR_M = 4.0  # metres per pixel from which a ship on radar is a speck


@dataclass(frozen=True)
class Rule:
    """`working`: metres per pixel looked at, empty = the scale does not depend on the ground sampling distance.
    Scales lie within `low` .. `high`: others are left out, and where none is left, the limit is taken. `unknown` are
    the scales for a tile whose ground sampling distance nobody knows."""

    working: tuple[float, ...] = ()
    unknown: tuple[float, ...] = (0.4, 0.75, 1.0, 1.5)
    low: float = 0.25
    high: float = 2.0

    def scales(self, gsd_m: float | None) -> tuple[float, ...]:
        """Scales to look at, ascending."""
        if gsd_m is None or not self.working:
            return self.unknown
        every = sorted(gsd_m / metres for metres in self.working)
        wanted = [scale for scale in every if self.low <= scale <= self.high]
        wanted = wanted or [min(max(every[0], self.low), self.high)]
        scales = wanted[:1]
        scales += [scale for before, scale in pairwise(wanted) if scale > SAME_SCALE * before]
        return tuple(scales)


ANY_BOX = Rule()
ANY_MASK = Rule(unknown=(1.0,))
_VEHICLE = Rule(working=(0.13, 0.27), unknown=(0.75, 1.4, 2.0), high=3.0)
_SEA_RADAR = Rule(unknown=(0.5,))

# Keys are what `kinds` calls a concept in its imagery.
BOXES: dict[str, Rule] = {
    "ship": Rule(working=(0.2, 0.5, 1.0, 2.0), unknown=(0.4, 0.55, 0.75, 1.0, 1.4, 2.0), high=2.8),
    "ship sar": Rule(working=(1.3, 1.8), unknown=(0.55, 0.75, 1.0, 1.4, 2.0)),
    "car": _VEHICLE,
    "vehicle": _VEHICLE,
    "bus": _VEHICLE,
    "truck": _VEHICLE,
    "large vehicle": _VEHICLE,
    "airplane": Rule(working=(0.2, 0.8)),
    "building": Rule(working=(0.27, 0.5), unknown=(0.4, 0.75, 1.4, 2.0)),
    "tree": Rule(working=(0.1, 0.133), unknown=(0.75, 1.0, 1.4, 2.0), high=3.0),
}
MASKS: dict[str, Rule] = {
    "ship": Rule(working=(2.0,), unknown=(0.4,)),
    "ship sar": Rule(working=(1.0,), unknown=(1.0, 1.4)),
    "car": Rule(working=(0.2,), unknown=(1.0,)),
    "building": Rule(working=(0.2,), unknown=(1.0,)),
    "tree": Rule(working=(0.1,), unknown=(1.0,)),
    "road": Rule(working=(0.5,), unknown=(0.5, 1.4), low=0.4),
    "water": Rule(unknown=(0.5, 1.0)),
    "water sar": _SEA_RADAR,
    "land sar": _SEA_RADAR,
    "oil spill": Rule(unknown=(0.35, 1.0)),
    "look-alike": Rule(unknown=(0.7,)),
    "forest": Rule(unknown=(1.5,)),
}
# Change: what the imagery is called, the ground sampling distance below which it is that, and its rule.
CHANGE: tuple[tuple[str, float, Rule], ...] = (
    ("fine", 1.0, Rule(working=(0.33,), high=1.5)),  # 0.5 m enlarged 1.5 times
    ("medium", 4.0, Rule(working=(1.5,), low=0.75)),
    ("coarse", math.inf, Rule(working=(6.7,), high=1.5)),  # 10 m enlarged 1.5 times
)
UNKNOWN_CHANGE = 1.0


def kinds(concept: str, modality: Modality, gsd_m: float | None = None) -> tuple[str, ...]:
    """What tables may call a concept in such imagery, the most particular first: `NAME sar coarse` on radar of
    `COARSE_RADAR_M` and above, `NAME sar` on any radar, `NAME`."""
    if modality != "sar":
        return (concept,)
    plain = f"{concept} sar", concept
    return plain if gsd_m is None or gsd_m < COARSE_RADAR_M else (f"{concept} sar coarse", *plain)


def suited(table: Mapping[str, _T], concept: str | None, modality: Modality, gsd_m: float | None = None) -> _T | None:
    """What a table has for a concept in such imagery (see `kinds`); None where it has nothing."""
    return next((table[kind] for kind in kinds(concept or "", modality, gsd_m) if kind in table), None)


def box_scales(concept: str | None, modality: Modality, gsd_m: float | None) -> tuple[float, ...]:
    """Scales at which to look for objects of a concept; None = a phrase of no known concept."""
    return (suited(BOXES, concept, modality) or ANY_BOX).scales(gsd_m)


def mask_scales(concept: str | None, modality: Modality, gsd_m: float | None) -> tuple[float, ...]:
    """Scales at which to draw a concept's mask, whose mean counts; None = a phrase of no known concept."""
    return (suited(MASKS, concept, modality) or ANY_MASK).scales(gsd_m)


def change_kind(gsd_m: float | None) -> str | None:
    """What imagery of this ground sampling distance is called: the key of its change threshold."""
    return None if gsd_m is None else next(kind for kind, below, _ in CHANGE if gsd_m < below)


def change_scale(gsd_m: float | None) -> float:
    """The scale at which to compare two images."""
    if gsd_m is None:
        return UNKNOWN_CHANGE
    return next(rule for _, below, rule in CHANGE if gsd_m < below).scales(gsd_m)[0]


def bounded(scale: float, image: np.ndarray) -> float:
    """The scale, or the largest at which the look has `MAX_LOOK_PIXELS`."""
    return min(scale, math.sqrt(MAX_LOOK_PIXELS / (image.shape[0] * image.shape[1])))
