"""At which scale the dense branch looks at a tile: pixels looked at per pixel of the tile.

A detector finds a thing best at the size on the screen at which it learned it. So each concept has working ground
sampling distances, and a tile whose pixels are known to be `gsd_m` metres is looked at with the scale `gsd_m /
working`. They follow from the scales of training's validation and the ground sampling distance of its sets: cars
0.2 m (0.2 m imagery as it is), trees 0.1 m, SAR ships 0.67 m (1 m imagery enlarged 1.5 times). Optical ships come in
two: 2 m, at which a freighter fits the receptive field (imagery of about 0.8 m seen at 0.4), and 0.5 m for boats.
Where the ground sampling distance is unknown, objects are searched at several scales (see scale_search), masks and
change are looked at with the scale of the imagery that they were learned on.

`BOXES`, `MASKS` and `CHANGE` are to be tuned on validation records whenever the weights change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from model_server.protocol import Modality

MAX_LOOK_PIXELS = 2048**2  # a larger look is made coarser: it would not fit a modest memory
SAME_SCALE = 1.25  # looks whose scales differ by less see the same


@dataclass(frozen=True)
class Rule:
    """`working`: metres per pixel looked at, empty = the scale does not depend on the ground sampling distance.
    Scales lie within `low` .. `high`; `unknown` are those for a tile whose ground sampling distance nobody knows."""

    working: tuple[float, ...] = ()
    unknown: tuple[float, ...] = (0.4, 0.75, 1.0, 1.5)
    low: float = 0.25
    high: float = 2.0

    def scales(self, gsd_m: float | None) -> tuple[float, ...]:
        """Scales to look at, ascending."""
        if gsd_m is None or not self.working:
            return self.unknown
        wanted = sorted(min(max(gsd_m / metres, self.low), self.high) for metres in self.working)
        scales = wanted[:1]
        scales += [scale for before, scale in pairwise(wanted) if scale > SAME_SCALE * before]
        return tuple(scales)


ANY_BOX = Rule()
ANY_MASK = Rule(unknown=(1.0,))
_VEHICLE = Rule(working=(0.2,))
_BUILDING = Rule(working=(0.2,))
_SEA_RADAR = Rule(unknown=(0.5,))

# Keys are concepts, with ` sar` behind them where radar imagery has a rule of its own.
BOXES: dict[str, Rule] = {
    "ship": Rule(working=(0.5, 2.0)),
    "ship sar": Rule(working=(0.67,), unknown=(0.75, 1.0, 1.5)),
    "car": _VEHICLE,
    "vehicle": _VEHICLE,
    "bus": _VEHICLE,
    "truck": _VEHICLE,
    "large vehicle": _VEHICLE,
    "airplane": Rule(working=(0.2, 0.8)),
    "building": _BUILDING,
    "tree": Rule(working=(0.1,), unknown=(0.75, 1.0, 1.5)),
}
MASKS: dict[str, Rule] = {
    "ship": Rule(working=(2.0,), unknown=(0.4,)),
    "ship sar": Rule(working=(0.67,), unknown=(1.5,)),
    "car": Rule(working=(0.2,), unknown=(1.0,)),
    "building": Rule(working=(0.2,), unknown=(1.0,)),
    "tree": Rule(working=(0.1,), unknown=(1.0,)),
    "road": Rule(working=(0.5,), unknown=(1.0,), low=0.4),
    "water": Rule(unknown=(0.75,)),
    "water sar": _SEA_RADAR,
    "land sar": _SEA_RADAR,
    "oil spill": _SEA_RADAR,
    "look-alike": _SEA_RADAR,
    "forest": Rule(unknown=(1.0,)),
}
# Change: the ground sampling distance below which a rule holds, and the rule.
CHANGE: tuple[tuple[float, Rule], ...] = (
    (1.0, Rule(working=(0.33,), unknown=(1.5,), high=1.5)),  # 0.5 m enlarged 1.5 times
    (4.0, Rule(working=(1.5,), low=0.75, high=2.0)),
    (math.inf, Rule(working=(5.0,), high=2.0)),  # 10 m enlarged twice
)


def box_scales(concept: str | None, modality: Modality, gsd_m: float | None) -> tuple[float, ...]:
    """Scales at which to look for objects of a concept; None = a phrase of no known concept."""
    return _rule(BOXES, ANY_BOX, concept, modality).scales(gsd_m)


def mask_scale(concept: str | None, modality: Modality, gsd_m: float | None) -> float:
    """The scale at which to draw a concept's mask; None = a phrase of no known concept."""
    return _rule(MASKS, ANY_MASK, concept, modality).scales(gsd_m)[0]


def change_scale(gsd_m: float | None) -> float:
    """The scale at which to compare two images."""
    rule = CHANGE[0][1] if gsd_m is None else next(rule for below, rule in CHANGE if gsd_m < below)
    return rule.scales(gsd_m)[0]


def bounded(scale: float, image: np.ndarray) -> float:
    """The scale, or the largest at which the look has `MAX_LOOK_PIXELS`."""
    return min(scale, math.sqrt(MAX_LOOK_PIXELS / (image.shape[0] * image.shape[1])))


def _rule(table: dict[str, Rule], default: Rule, concept: str | None, modality: Modality) -> Rule:
    plain = table.get(concept or "", default)
    return table.get(f"{concept} sar", plain) if modality == "sar" else plain
