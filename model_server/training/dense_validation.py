"""Figures of the dense branch on validation records, and the thresholds that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model_server.calibration import DenseCalibration, Logistic
from model_server.dense.perceiver import DensePerceiver
from model_server.dense.working_scale import change_kind, kinds
from model_server.evaluation.dense_metrics import (
    ImageBoxes,
    ProbabilityCounts,
    average_precision,
    best_f1,
    match_boxes,
    mean_average_precision,
    steady_threshold,
)
from model_server.protocol import Modality, TileChange, TileMasks, TileObjects
from model_server.query import Query
from model_server.text.concepts import CONCEPTS
from model_server.training.concepts import boxed, masked
from model_server.training.dense_data import Scene
from model_server.training.dense_windows import relit
from model_server.training.export import fit_logistic
from model_server.training.records import Record

SETS = (
    "inshore_ships", "estonia_aerial", "neon_trees", "hrsid_sar", "epfl_roads", "flood", "amazon_forest",
    "oil_spill_sar", "opensarship", "oscd", "sztaki_air", "levir_dsifn", "egy_bcd",
)  # fmt: skip
CHIPS = "opensarship"  # shows one ship in the middle of each image and has no boxes
BOX_IOU = {"hrsid_sar": 0.3, "neon_trees": 0.4}  # of the extra AP and F1 and of thresholds; 0.5 elsewhere


@dataclass
class Gathered:
    """Raw predictions of a validation pass, by set and concept."""

    boxes: dict[tuple[str, str], list[ImageBoxes]] = field(default_factory=dict)  # as `kinds` calls the concept there
    masks: dict[tuple[str, str], ProbabilityCounts] = field(default_factory=dict)
    change: dict[tuple[str, str | None], ProbabilityCounts] = field(default_factory=dict)  # by set and kind of imagery
    still: ProbabilityCounts = field(default_factory=ProbabilityCounts)  # pairs of one image, as it is or re-lit


def label_of(concept: str) -> str:
    """The phrase that most callers will use for a concept."""
    return CONCEPTS[concept].said[0]


def gather(perceiver: DensePerceiver, scenes: Iterable[Scene], say: Callable[[str], str] = label_of) -> Gathered:
    """Ask every concept that a scene is labelled for, in the words that `say` has for it, as a caller would.

    The perceiver's calibration should be the plain `DenseCalibration()`, so that scores are raw.
    """
    out, rng = Gathered(), np.random.default_rng(0)
    for scene in scenes:
        if len(scene.images) == 2:
            _gather_change(perceiver, scene, rng, out)
        else:
            _gather_boxes(perceiver, scene, say, out)
            _gather_masks(perceiver, scene, say, out)
    return out


def _modality(record: Record) -> Modality:
    return "sar" if record.modality == "sar" else "optical"


def _gather_boxes(perceiver: DensePerceiver, scene: Scene, say: Callable[[str], str], out: Gathered) -> None:
    record, image = scene.record, scene.images[0]
    names = ["ship"] if record.set == CHIPS else sorted(boxed(record))
    labels = [o.label for o in record.objects]
    queries = [Query("ground", image, say(n), gsd_m=record.gsd_m, modality=_modality(record)) for n in names]
    for name, answer in zip(names, perceiver.answer(queries), strict=True):
        assert isinstance(answer, TileObjects)
        boxes, scores = np.array(answer.boxes, np.float32).reshape(-1, 4), np.array(answer.scores, np.float32)
        truth = scene.boxes[[label in CONCEPTS[name].labels for label in labels]]
        if record.set == CHIPS:
            truth = _in_the_middle(boxes, record.width, record.height)
        key = (record.set, kinds(name, _modality(record), record.gsd_m)[0])
        out.boxes.setdefault(key, []).append(ImageBoxes(boxes, scores, truth))


def _in_the_middle(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """The ship of a chip, which nobody drew a box of, [1, 4]: the surest of the boxes [N, 4] that holds the middle;
    where none does, the whole chip, which is missed."""
    x, y = width / 2, height / 2
    holds = (boxes[:, 0] <= x) & (boxes[:, 1] <= y) & (boxes[:, 2] >= x) & (boxes[:, 3] >= y)
    return np.concatenate((boxes[holds], np.array([[0, 0, width, height]], np.float32)))[:1]


def _gather_masks(perceiver: DensePerceiver, scene: Scene, say: Callable[[str], str], out: Gathered) -> None:
    if scene.mask is None:
        return
    record, classes = scene.record, masked(scene.record)
    names = sorted(classes)
    labels = tuple(say(name) for name in names)
    query = Query("segment", scene.images[0], labels=labels, gsd_m=record.gsd_m, modality=_modality(record))
    (answer,) = perceiver.answer([query])
    assert isinstance(answer, TileMasks)
    for name, p in zip(names, answer.probabilities, strict=True):
        counts = out.masks.setdefault((record.set, name), ProbabilityCounts())
        counts.add(p / 255, np.isin(scene.mask, list(classes[name])))


def _gather_change(perceiver: DensePerceiver, scene: Scene, rng: np.random.Generator, out: Gathered) -> None:
    before, after = scene.images
    assert scene.mask is not None
    part = np.array(before[:384, :384])
    light = relit(torch.from_numpy(part).permute(2, 0, 1), rng).permute(1, 2, 0).numpy()
    pairs, gsd_m = ((before, after), (part, part), (part, light)), scene.record.gsd_m
    answers = perceiver.answer([Query("detect_change", a, after=b, gsd_m=gsd_m) for a, b in pairs])
    key = (scene.record.set, change_kind(gsd_m))
    for i, answer in enumerate(answers):
        assert isinstance(answer, TileChange)
        p = answer.probabilities / 255
        if i == 0:
            out.change.setdefault(key, ProbabilityCounts()).add(p, scene.mask > 127)
        else:
            out.still.add(p, np.zeros(p.shape, bool))


def figures(found: Gathered, thresholds: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
    """AP and F1 of boxes, IoU of masks, F1 of change and the share of still pixels called changed.

    Masks and change at their own best threshold where none are given.
    """
    out: dict[str, float] = {}
    for (group, name), images in sorted(found.boxes.items()):
        if not sum(len(i.truth) for i in images):
            continue
        key, extra = f"{group}/{name}", BOX_IOU.get(group, 0.5)
        out[f"{key} ap50"] = average_precision(images)
        out[f"{key} ap75"] = average_precision(images, 0.75)
        out[f"{key} ap50_95"] = mean_average_precision(images)
        if extra != 0.5:
            out[f"{key} ap{round(100 * extra)}"] = average_precision(images, extra)
        out[f"{key} f1_{round(100 * extra)}"] = best_f1(images, extra)
    for (group, name), counts in sorted(found.masks.items()):
        at = (thresholds or {}).get("mask", {}).get(name)
        out[f"{group}/{name} iou"] = (counts.best()[1] if at is None else counts.at(at)).iou
    at = (thresholds or {}).get("change", {}).get("default")
    pooled = _pooled(found.change.values())
    for group in sorted({group for group, _ in found.change}):
        counts = _summed(c for (g, _), c in found.change.items() if g == group)
        out[f"{group} f1"] = counts.best()[1].f1
        out[f"{group} f1_common"] = counts.at(pooled.best()[0] if at is None else at).f1
    if found.change:
        still, first = found.still.outside, round((pooled.best()[0] if at is None else at) * found.still.bins)
        out["still changed"] = float(still[first:].sum() / max(still.sum(), 1))
    return {k: round(v, 4) for k, v in out.items()}


def _pooled(counts: Iterable[ProbabilityCounts]) -> ProbabilityCounts:
    """All sets with equal weight, so that the largest image does not choose for all."""
    out = ProbabilityCounts()
    for c in counts:
        total = max(c.inside.sum() + c.outside.sum(), 1)
        out.inside += np.round(c.inside * (1e6 / total)).astype(np.int64)
        out.outside += np.round(c.outside * (1e6 / total)).astype(np.int64)
    return out


def _summed(counts: Iterable[ProbabilityCounts]) -> ProbabilityCounts:
    out = ProbabilityCounts()
    for c in counts:
        out.inside += c.inside
        out.outside += c.outside
    return out


def fit_calibration(found: Gathered) -> DenseCalibration:
    """Thresholds of high F1: of boxes and masks by concept, of change by the kind of imagery."""
    concepts = sorted({name for _, name in found.boxes})
    detect, confidence = {}, {}
    for name in concepts:
        groups = {group: images for (group, n), images in sorted(found.boxes.items()) if n == name}
        images = [image for group in groups.values() for image in group]
        if sum(len(i.truth) for i in images) >= 5:
            detect[name] = steady_threshold(images, min(BOX_IOU.get(group, 0.5) for group in groups))
            confidence[name] = _box_confidence(images)
    everything = [image for images in found.boxes.values() for image in images]
    mask = {
        name: _pooled(c for (_, n), c in sorted(found.masks.items()) if n == name).best()[0]
        for name in sorted({n for _, n in found.masks})
    }
    kinds = sorted({kind for _, kind in found.change}, key=str)
    change = {"default": _pooled(found.change.values()).best()[0]}
    for kind in kinds:
        change[kind or "default"] = _pooled(c for (_, k), c in found.change.items() if k == kind).best()[0]
    return DenseCalibration(
        detect={"default": steady_threshold(everything) if everything else 0.35, **detect},
        mask={"default": float(np.mean(list(mask.values()))) if mask else 0.5, **mask},
        change=change,
        box_confidence={"default": _box_confidence(everything), **confidence},
    )


def _box_confidence(images: Sequence[ImageBoxes]) -> Logistic:
    rows = [match_boxes(image, 0.5, len(image.boxes)) for image in images if len(image.boxes)]
    if not rows:
        return Logistic()
    scores = torch.from_numpy(np.concatenate([s for s, _ in rows])).clamp(1e-4, 1 - 1e-4)
    return fit_logistic(torch.logit(scores), torch.from_numpy(np.concatenate([h for _, h in rows])).float())
