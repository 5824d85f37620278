"""Masks of class names against labelled masks (protocol `miou`): IoU and boundary F1, counted over all images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from model_server.evaluation.asking import Model
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.dense_metrics import BoundaryTally, MaskTally
from model_server.evaluation.labelled import load_mask, mask_values, other_words, words_for
from model_server.evaluation.looking import outline
from model_server.evaluation.results import Controls, Results, Row
from model_server.training.records import Record

Figures = dict[str, float]


@dataclass
class Outline:
    """Pixels and boundaries of one class, or of one phrase for it."""

    pixels: MaskTally = field(default_factory=MaskTally)
    edges: BoundaryTally = field(default_factory=BoundaryTally)

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        self.pixels.add(predicted, truth)
        self.edges.add(predicted, truth)


def evaluate_segmentation(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the mask rows of one set: the mean over its classes without background, and each class."""
    records = [record for record in data.records if record.mask and len(record.images) == 1 and mask_values(record)]
    if not records:
        results.notes.append(f"{data.name}: no class masks in split {data.split!r}, so no segmentation row")
        return
    seen = _tally(model, records, lambda name: (words_for(name), *other_words(name)), f"{data.name} masks")
    # A class that no image holds has no IoU.
    names = sorted({name for name, _ in seen if seen[name, words_for(name)].edges.true})
    blind = _tally(model, records, lambda name: (words_for(name),), f"{data.name} masks, blind", blind=True)
    usual = [(name, words_for(name)) for name in names]
    commonest = _commonest(data.train)
    controls = {
        "majority": _constant(seen, usual, lambda name: name == commonest) if commonest else None,
        "everything": _constant(seen, usual, lambda _: True),
        "blind": _figures(blind, usual),
    }
    results.rows += _rows(data, "miou", _figures(seen, usual), len(records), controls)
    if not commonest:
        results.notes.append(f"{data.name}: no training masks, so no majority mask")
    others = [name for name in names if other_words(name)]
    if others:
        most = max(len(other_words(name)) for name in others)
        ways = [[(name, other_words(name)[i % len(other_words(name))]) for name in others] for i in range(most)]
        each = [_figures(seen, way) for way in ways]
        mean = {metric: float(np.mean([figures[metric] for figures in each])) for metric in each[0]}
        same = {"label_words": _figures(seen, [(name, words_for(name)) for name in others])}
        results.rows += _rows(data, "miou/held-out-phrasing", mean, len(records), same)


def _tally(model: Model, records: Sequence[Record], words: Callable[[str], Sequence[str]], title: str,
           blind: bool = False) -> dict[tuple[str, str], Outline]:  # fmt: skip
    """The outline of every (class, phrase) over all images."""
    out: defaultdict[tuple[str, str], Outline] = defaultdict(Outline)

    def phrases(record: Record) -> list[str]:
        return list(dict.fromkeys(text for name in mask_values(record) for text in words(name)))

    for record, masks in outline(model, records, phrases, title, blind):
        assert record.mask is not None
        truth = load_mask(record.mask)
        for name, value in mask_values(record).items():
            for text in words(name):
                out[name, text].add(masks[text], truth == value)
    return dict(out)


def _commonest(train: Sequence[Record]) -> str | None:
    """The class, background among them, of most pixels of the training masks."""
    pixels: Counter[str] = Counter()
    for record in train:
        if record.mask and len(record.images) == 1:
            counts = np.bincount(load_mask(record.mask).ravel())
            pixels.update({record.mask_classes.get(v, "?"): int(n) for v, n in enumerate(counts) if n})
    return max(sorted(pixels), key=lambda name: pixels[name]) if pixels else None


def _figures(tallies: dict[tuple[str, str], Outline], asked: Sequence[tuple[str, str]]) -> Figures:
    out: Figures = {}
    for name, text in asked:
        out[f"iou/{name}"] = tallies[name, text].pixels.scores().iou
        out[f"boundary_f1/{name}"] = tallies[name, text].edges.f1()
    return out | _means(out)


def _constant(
    tallies: dict[tuple[str, str], Outline], asked: Sequence[tuple[str, str]], everywhere: Callable[[str], bool]
) -> Figures:
    """Figures of calling every pixel the class, or none: a mask without a boundary."""
    out: Figures = {}
    for name, text in asked:
        pixels = tallies[name, text].pixels
        share = (pixels.true + pixels.missed) / pixels.total
        out |= {f"iou/{name}": share if everywhere(name) else 0.0, f"boundary_f1/{name}": 0.0}
    return out | _means(out)


def _means(out: Figures) -> Figures:
    return {
        metric: float(np.mean([value for name, value in out.items() if name.startswith(f"{metric}/")]))
        for metric in ("iou", "boundary_f1")
    }


def _rows(data: EvaluatedSet, protocol: str, ours: Figures, n: int,
          controls: Mapping[str, Figures | None]) -> list[Row]:  # fmt: skip
    rows = []
    for metric in sorted(ours, key=lambda name: (name.partition("/")[2], name.partition("/")[0] != "iou")):
        beside: Controls = {name: figures[metric] if figures else None for name, figures in controls.items()}
        rows.append(Row(data.name, data.split, "segment", protocol, metric, ours[metric], n, beside))
    return rows
