"""What a change caption claims, held against the labelled mask (protocol `facts`).

No set here has captions of change, so nothing is compared word by word: the tools' caption says how much changed and
in which ninth of the image the largest region lies (`change_words`), and both can be checked. Every pair is judged as a
whole and by its four quarters, cut from the same answer, where the labels know a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from model_server.change_words import ChangeFacts, place_in
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.results import Controls, Results, Row

LEAST = 4  # pixels of a region that is spoken of, as in the tools
FACTOR = 2.0  # within which an amount is called right
Pair = tuple[np.ndarray, np.ndarray]  # changed as found and as labelled, bool [H, W]


def regions_of(mask: np.ndarray) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Pixels and box (x1, y1, x2, y2) of each 4-connected region of a mask, the largest first: runs of rows, joined."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []  # row, start, end

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        here = []
        for start, end in edges.reshape(-1, 2).tolist():
            i = len(runs)
            runs.append((y, start, end))
            parent.append(i)
            here.append(i)
            for j in above:
                if runs[j][1] < end and start < runs[j][2]:
                    parent[root(j)] = root(i)
        above = here
    grouped: dict[int, list[tuple[int, int, int]]] = {}
    for i, run in enumerate(runs):
        grouped.setdefault(root(i), []).append(run)
    found = [
        (sum(e - s for _, s, e in g),
         (min(s for _, s, _ in g), min(y for y, _, _ in g), max(e for _, _, e in g), max(y for y, _, _ in g) + 1))
        for g in grouped.values()
    ]  # fmt: skip
    return sorted((r for r in found if r[0] >= LEAST), key=lambda r: -r[0])


def facts_of(mask: np.ndarray) -> ChangeFacts | None:
    """What the tools would say of a mask; None where nothing changed."""
    regions = regions_of(mask)
    if not regions:
        return None
    pixels, box = regions[0]
    place = place_in(box, (0, 0, mask.shape[1], mask.shape[0]))
    return ChangeFacts(len(regions), float(mask.mean()), pixels / int(mask.sum()), place)


def add_facts(data: EvaluatedSet, ours: Sequence[Pair], dropped: Sequence[Pair], results: Results) -> None:
    """Add the rows of one set: masks with their labels, of the model and of the model without the first image."""
    claims = [(facts_of(found), truth) for pair in ours for found, truth in _views(*pair)]
    if not claims:
        return
    without = [(facts_of(found), truth) for pair in dropped for found, truth in _views(*pair)]
    usual = float(np.median([truth.mean() for _, truth in claims]))
    constant = [(ChangeFacts(1, usual, 1.0, "centre"), truth) for _, truth in claims]
    figures = {name: _figures(c) for name, c in (("ours", claims), ("dropped_before", without), ("centre", constant))}
    for metric, value in figures.pop("ours").items():
        beside: Controls = {name: values[metric] for name, values in figures.items()}
        results.rows.append(Row(data.name, data.split, "detect_change", "facts", metric, value, len(claims), beside))


def _figures(claims: Sequence[tuple[ChangeFacts | None, np.ndarray]]) -> dict[str, float]:
    place, overlap, amount, off = [], [], [], []
    for said, truth in claims:
        wanted = facts_of(truth)
        assert wanted is not None
        place.append(said is not None and said.place == wanted.place)
        overlap.append(said is not None and _holds(said.place, truth))
        share = 0.0 if said is None else said.share
        amount.append(share > 0 and max(share / wanted.share, wanted.share / share) <= FACTOR)
        off.append(abs(share - wanted.share))
    values = {"place": place, "place_holds": overlap, "amount": amount, "amount_error": off}
    return {name: float(np.mean(each)) for name, each in values.items()}


def _holds(place: str, truth: np.ndarray) -> bool:
    """Whether the named ninth holds at least its share, a ninth, of the labelled change."""
    height, width = truth.shape
    row = 0 if "upper" in place else 2 if "lower" in place else 1
    column = 0 if "left" in place else 2 if "right" in place else 1
    part = truth[row * height // 3 : (row + 1) * height // 3, column * width // 3 : (column + 1) * width // 3]
    return bool(part.sum() * 9 >= truth.sum())


def _views(found: np.ndarray, truth: np.ndarray) -> Iterator[Pair]:
    """The whole and its quarters, those with labelled change."""
    halves = [(slice(n // 2), slice(n // 2, None)) for n in truth.shape]
    for part in ((slice(None), slice(None)), *product(*halves)):
        if regions_of(truth[part]):
            yield found[part], truth[part]
