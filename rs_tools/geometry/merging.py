"""One list of objects from the boxes that overlapping tiles found, each object once.

Two boxes from different tiles are one object when they agree where both tiles look. A box that touches an inner edge
of its tile is cut there: what the other box shows beyond that edge says nothing against it. So a part agrees with the
whole, and the two halves of a ship across a seam agree in the overlap and become one box.

A tile has already told its own objects apart, so boxes of one tile never merge, nor do merged boxes that share a tile.
This is what keeps two touching ships apart where their boxes overlap: each finds its own twin first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from rs_tools.geometry.measures import TileFrame, scales, to_scene

_AGREE = 0.5  # intersection over union of what both tiles can see
_INSIDE = 0.8  # intersection over the smaller: one of the two tiles saw only a part
_EDGE = 3.0  # tile pixels; a box that ends this close to a tile's edge is cut there
_EDGE_SHARE, _EDGE_MOST = 0.05, 8.0  # of the box's side, as long boxes are placed less exactly; in tile pixels
_IN_LINE = 0.5  # halves that only meet at a seam share this much of the smaller's extent along it
_IN_LINE_RANGE = (0.15, 1 / 3)  # halves that overlap share less where the object crosses the seam aslant
_CHUNK = 8192


@dataclass(frozen=True)
class Detections:
    """Boxes in scene pixels with what is known of the tiles that they were seen in.

    Attributes:
        boxes: float64 [N, 4] x1, y1, x2, y2.
        scores: float64 [N].
        labels: str [N].
        tiles: for each box the tiles that saw it.
        cut: bool [N, 4], the sides (left, top, right, bottom) where the object may go on beyond its tiles.
        slack: float64 [N], how far, in scene pixels, a box may end before the edge that cuts it.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    tiles: tuple[frozenset[int], ...]
    cut: np.ndarray
    slack: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def in_tiles(
        cls,
        frames: Sequence[TileFrame],
        boxes: Sequence[np.ndarray],
        scores: Sequence[Sequence[float] | np.ndarray],
        labels: Sequence[Sequence[str]],
        bounds: Sequence[int],
    ) -> Detections:
        """What tiles show, numbered as they come.

        Args:
            frames: where each lies.
            boxes: of each tile float [N, 4] in tile pixels; what lies outside the tile is cut off.
            scores, labels: of each tile's boxes.
            bounds: [x1, y1, x2, y2] of all tiles together in scene pixels; no box is cut at these edges.
        """
        if not frames:
            none = np.zeros(0)
            return cls(np.zeros((0, 4)), none, np.zeros(0, str), (), np.zeros((0, 4), bool), none)
        owner = np.repeat(np.arange(len(frames)), [len(one) for one in boxes])
        size = np.array([frame.size for frame in frames])[owner]
        size = np.concatenate([size, size], axis=1)
        inside = np.clip(np.concatenate(boxes).reshape(-1, 4), 0, size)
        sides = inside[:, 2:] - inside[:, :2]
        slack = np.maximum(_EDGE, np.minimum(_EDGE_SHARE * sides, _EDGE_MOST))  # [N, 2]
        gaps = np.concatenate([inside[:, :2], size[:, 2:] - inside[:, 2:]], axis=1)
        inner = (np.array([frame.region for frame in frames]) != np.asarray(bounds))[owner]
        return cls(
            boxes=to_scene(frames, owner, inside.reshape(-1, 2, 2)).reshape(-1, 4),
            scores=np.concatenate(scores).astype(float),
            labels=np.concatenate([np.asarray(some, str) for some in labels]),
            tiles=tuple(frozenset([tile]) for tile in owner.tolist()),
            cut=(gaps <= np.concatenate([slack, slack], axis=1)) & inner,
            slack=(slack * scales(frames)[owner]).max(axis=1),
        )

    def _taken(self, index: np.ndarray) -> Detections:
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            tuple(self.tiles[i] for i in index),
            self.cut[index],
            self.slack[index],
        )


def merge(detections: Detections) -> Detections:
    """Each object once, best score first.

    Boxes of the same label pair off with the box of another tile that they agree with most; a pair becomes one box:
    the union of two parts, the whole rather than a part, the better scored of two wholes. Repeated until nothing pairs,
    so that objects over many tiles become one and merging again changes nothing. The order of boxes and tiles does
    not matter. Takes O(n log n) where each box overlaps few others.
    """
    found = detections._taken(_canonical(detections))
    fresh = np.arange(len(found))
    while len(fresh):
        pairs = _pairs(found, fresh)
        found, fresh = _combined(found, pairs)
    order = _canonical(found)
    return found._taken(order[np.argsort(-found.scores[order], kind="stable")])


def _canonical(found: Detections) -> np.ndarray:
    """An order that depends on what the boxes are, not on how they came."""
    columns = [found.slack, *found.cut.T, found.scores, *found.boxes.T[::-1], found.labels]
    return np.lexsort(columns)


def _pairs(found: Detections, fresh: np.ndarray) -> np.ndarray:
    """Int [K, 2]: boxes to combine, none twice, those that agree most first. One of each pair is in `fresh`."""
    asks = np.zeros(len(found), bool)
    asks[fresh] = True
    pairs, agreements = [np.zeros((0, 2), int)], [np.zeros(0)]
    for first, second in _near(found, fresh):
        once = (first < second) | ~asks[second]  # two fresh boxes find each other, and one of the times is enough
        first, second = first[once], second[once]
        alike = found.labels[first] == found.labels[second]
        first, second = first[alike], second[alike]
        if len(first) == 0:
            continue
        agreement = _agreement(found, first, second)
        agreed = agreement > 0
        pairs.append(np.sort(np.stack([first, second], axis=1)[agreed], axis=1))
        agreements.append(agreement[agreed])
    candidates, agreement = np.concatenate(pairs), np.concatenate(agreements)
    order = np.lexsort([candidates[:, 1], candidates[:, 0], -agreement])
    taken: set[int] = set()
    chosen = []
    for first, second in candidates[order].tolist():
        if first in taken or second in taken or not found.tiles[first].isdisjoint(found.tiles[second]):
            continue
        taken |= {first, second}
        chosen.append((first, second))
    return np.array(chosen, int).reshape(-1, 2)


def _near(found: Detections, fresh: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of boxes that overlap or nearly touch, in batches, so that crowds do not fill the memory."""
    tree = shapely.STRtree(shapely.box(*found.boxes.T))
    reach = 2 * found.slack.max(initial=0)
    for start in range(0, len(fresh), _CHUNK):
        some = fresh[start : start + _CHUNK]
        wider = found.boxes[some] + [-reach, -reach, reach, reach]
        first, second = tree.query(shapely.box(*wider.T))
        yield some[first], second


def _agreement(found: Detections, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How well boxes agree where both tiles look, in 0..1; 0 where they are not one object. float64 [K]"""
    a, b = found.boxes[first], found.boxes[second]
    cut_a, cut_b = found.cut[first], found.cut[second]
    seen_a, seen_b = _clipped(a, b, cut_b), _clipped(b, a, cut_a)
    shared = _area(_intersection(seen_a, seen_b))
    area_a, area_b = _area(seen_a), _area(seen_b)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0: a box without area agrees with nothing
        union = np.nan_to_num(shared / (area_a + area_b - shared))
        smaller = np.nan_to_num(shared / np.minimum(area_a, area_b))
    agreement = np.where((union >= _AGREE) | (smaller >= _INSIDE), union, 0.0)
    slack = found.slack[first] + found.slack[second]
    for axis in (0, 1):
        for x, y, cut_x, cut_y in ((a, b, cut_a, cut_b), (b, a, cut_b, cut_a)):
            (facing,) = np.nonzero(cut_x[:, axis + 2] & cut_y[:, axis])
            if len(facing):
                in_line = _in_line(x[facing], y[facing], axis, slack[facing])
                agreement[facing] = np.maximum(agreement[facing], in_line)
    return agreement


def _in_line(a: np.ndarray, b: np.ndarray, axis: int, slack: np.ndarray) -> np.ndarray:
    """How well `a`, cut at its far end along an axis, goes on in `b`, cut at its near end; float64 [K]."""
    other = 1 - axis
    overlap = a[:, axis + 2] - b[:, axis]
    low, high = np.maximum(a[:, other], b[:, other]), np.minimum(a[:, other + 2], b[:, other + 2])
    shared = np.maximum(0, high - low)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    smaller = np.minimum(size_a[:, other], size_b[:, other])
    whole = np.maximum(a[:, other + 2], b[:, other + 2]) - np.minimum(a[:, other], b[:, other])
    with np.errstate(invalid="ignore", divide="ignore"):  # boxes without area
        # Aslant, an object moves along the seam by its slope while it crosses the overlap, and is in both halves there.
        slope = np.minimum(size_a[:, other] / size_a[:, axis], size_b[:, other] / size_b[:, axis])
        aslant = np.clip(0.5 * overlap * slope / smaller, *_IN_LINE_RANGE)
        needed = np.where(overlap > slack, aslant, _IN_LINE)
        goes_on = (a[:, axis] < b[:, axis]) & (a[:, axis + 2] < b[:, axis + 2]) & (overlap >= -slack)
        return np.where(goes_on & (shared > 0) & (shared / smaller >= needed), shared / whole, 0.0)


def _clipped(box: np.ndarray, other: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """The boxes without what lies beyond the sides where the other box is cut."""
    low = np.where(cut[:, :2], np.maximum(box[:, :2], other[:, :2]), box[:, :2])
    high = np.where(cut[:, 2:], np.minimum(box[:, 2:], other[:, 2:]), box[:, 2:])
    return np.concatenate([low, high], axis=1)


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1)


def _area(box: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(0, box[:, 2:] - box[:, :2]), axis=1)


def _combined(found: Detections, pairs: np.ndarray) -> tuple[Detections, np.ndarray]:
    """The boxes with each pair in the place of its first, and where the new ones are."""
    if len(pairs) == 0:
        return found, np.zeros(0, int)
    first, second = pairs.T
    cut = found.cut.max(axis=1)
    better = (found.scores[second] > found.scores[first]) & (cut[first] == cut[second])
    better |= cut[first] & ~cut[second]
    both = (cut[first] & cut[second])[:, None]
    union, union_cut = _union(found, first, second)
    kept = np.where(better, second, first)
    boxes, cuts, scores, slack = found.boxes.copy(), found.cut.copy(), found.scores.copy(), found.slack.copy()
    boxes[first] = np.where(both, union, found.boxes[kept])
    cuts[first] = np.where(both, union_cut, found.cut[kept])
    scores[first] = np.maximum(found.scores[first], found.scores[second])
    slack[first] = np.maximum(found.slack[first], found.slack[second])
    tiles = list(found.tiles)
    for one, other in pairs.tolist():
        tiles[one] = tiles[one] | tiles[other]
    stays = np.ones(len(found), bool)
    stays[second] = False
    (index,) = np.nonzero(stays)
    combined = Detections(boxes, scores, found.labels, tuple(tiles), cuts, slack)._taken(index)
    return combined, np.searchsorted(index, np.sort(first))


def _union(found: Detections, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each side from the box that reaches further; an uncut side is believed before one cut about there."""
    outward = np.array([-1, -1, 1, 1])
    cut_a, cut_b = found.cut[first], found.cut[second]
    a, b = found.boxes[first] * outward, found.boxes[second] * outward
    from_b = b - cut_b * found.slack[second][:, None] > a - cut_a * found.slack[first][:, None]
    return np.where(from_b, b, a) * outward, np.where(from_b, cut_b, cut_a)
