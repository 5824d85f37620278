"""Figures of the dense branch on validation records, and the thresholds that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model_server.calibration import DenseCalibration, Logistic
from model_server.evaluation.dense_metrics import (
    ImageBoxes,
    ProbabilityCounts,
    average_precision,
    best_f1_threshold,
    match_boxes,
    mean_average_precision,
)
from model_server.model.dense import DenseBranch, Maps, early_maps, objects_of
from model_server.model.looks import Frame
from model_server.model.vision import Backbone
from model_server.text.concepts import CONCEPTS
from model_server.training.concepts import boxed, masked
from model_server.training.dense_data import Scene, relit
from model_server.training.export import fit_logistic

# Pixels looked at per pixel of the source. Coarse imagery is enlarged, so that its small things fill some cells.
SCALES = {
    "inshore_ships": 0.4, "estonia_aerial": 1.0, "neon_trees": 1.0, "hrsid_sar": 1.5, "epfl_roads": 1.0, "flood": 0.75,
    "amazon_forest": 1.0, "oil_spill_sar": 0.5, "oscd": 2.0, "sztaki_air": 1.0, "levir_dsifn": 1.5, "egy_bcd": 1.5,
}  # fmt: skip
COARSE_SETS = frozenset({"oscd"})  # 10 m a pixel
BOX_IOU = {"hrsid_sar": 0.3, "neon_trees": 0.4}  # of the extra AP and F1; 0.5 elsewhere


class Looker:
    """The shared blocks and the branch on single images of any size."""

    def __init__(self, backbone: Backbone, branch: DenseBranch, phrases: Mapping[str, Tensor]) -> None:
        self.backbone, self.branch, self.phrases = backbone, branch, phrases

    def vectors(self, names: Sequence[str]) -> Tensor:  # -> [1, K, E]
        return torch.stack([self.phrases[name] for name in names])[None]

    @torch.no_grad()
    def maps(self, image: np.ndarray, frame: Frame) -> Maps:
        early = early_maps(self.backbone, frame.look(image)[None], self.branch.config.shared)
        return self.branch.maps({s: m.float() for s, m in early.items()})

    @torch.no_grad()
    def boxes(self, image: np.ndarray, scale: float, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Boxes [N, 4] in source pixels and scores [N], for each phrase."""
        frame = Frame.of(image, scale)
        found = self.branch.detect(self.branch.features(self.maps(image, frame)), self.vectors(names))
        out = []
        for k in range(len(names)):
            objects = objects_of(found, 0, k)
            out.append((frame.boxes_on_source(objects.boxes).numpy(), objects.scores.numpy()))
        return out

    @torch.no_grad()
    def masks(self, image: np.ndarray, scale: float, names: Sequence[str]) -> np.ndarray:
        """Probabilities [K, H, W] on the source's pixels."""
        frame = Frame.of(image, scale)
        logits = self.branch.segment(self.branch.features(self.maps(image, frame)), self.vectors(names))
        return frame.logits_on_source(logits[0]).sigmoid().numpy()

    @torch.no_grad()
    def change(self, before: np.ndarray, after: np.ndarray, scale: float) -> np.ndarray:
        """Probability of change [H, W] on the source's pixels."""
        frame = Frame.of(before, scale)
        logits = self.branch.change(self.maps(before, frame), self.maps(after, frame))
        return frame.logits_on_source(logits)[0].sigmoid().numpy()


@dataclass
class Gathered:
    """Raw predictions of a validation pass, by set and concept."""

    boxes: dict[tuple[str, str], list[ImageBoxes]] = field(default_factory=dict)
    masks: dict[tuple[str, str], ProbabilityCounts] = field(default_factory=dict)
    change: dict[str, ProbabilityCounts] = field(default_factory=dict)
    still: ProbabilityCounts = field(default_factory=ProbabilityCounts)  # pairs of one image, as it is or re-lit


def label_of(concept: str) -> str:
    """The phrase that most callers will use for a concept."""
    return CONCEPTS[concept].said[0]


def gather(looker: Looker, scenes: Iterable[Scene], scales: Mapping[str, float] = SCALES,
           say: Callable[[str], str] = label_of) -> Gathered:  # fmt: skip
    """Ask every concept that a scene is labelled for, in the words that `say` has for it."""
    out, rng = Gathered(), np.random.default_rng(0)
    for scene in scenes:
        scale = scales[scene.record.set]
        if len(scene.images) == 2:
            _gather_change(looker, scene, scale, rng, out)
        else:
            _gather_boxes(looker, scene, scale, say, out)
            _gather_masks(looker, scene, scale, say, out)
    return out


def _gather_boxes(looker: Looker, scene: Scene, scale: float, say: Callable[[str], str], out: Gathered) -> None:
    names = sorted(boxed(scene.record))
    if not names:
        return
    labels = [o.label for o in scene.record.objects]
    asked = looker.boxes(scene.images[0], scale, [say(name) for name in names])
    for name, (boxes, scores) in zip(names, asked, strict=True):
        truth = scene.boxes[[label in CONCEPTS[name].labels for label in labels]]
        out.boxes.setdefault((scene.record.set, name), []).append(ImageBoxes(boxes, scores, truth))


def _gather_masks(looker: Looker, scene: Scene, scale: float, say: Callable[[str], str], out: Gathered) -> None:
    if scene.mask is None:
        return
    classes = masked(scene.record)
    names = sorted(classes)
    asked = looker.masks(scene.images[0], scale, [say(name) for name in names])
    for name, p in zip(names, asked, strict=True):
        counts = out.masks.setdefault((scene.record.set, name), ProbabilityCounts())
        counts.add(p, np.isin(scene.mask, list(classes[name])))


def _gather_change(looker: Looker, scene: Scene, scale: float, rng: np.random.Generator, out: Gathered) -> None:
    before, after = scene.images
    assert scene.mask is not None
    counts = out.change.setdefault(scene.record.set, ProbabilityCounts())
    counts.add(looker.change(before, after, scale), scene.mask > 127)
    part = before[:384, :384]
    light = relit(torch.from_numpy(np.array(part)).permute(2, 0, 1), rng).permute(1, 2, 0).numpy()
    for other in (part, light):
        still = looker.change(part, other, scale)
        out.still.add(still, np.zeros(still.shape, bool))


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
        out[f"{key} f1_{round(100 * extra)}"] = best_f1_threshold(images, extra)[1]
    for (group, name), counts in sorted(found.masks.items()):
        at = (thresholds or {}).get("mask", {}).get(name)
        out[f"{group}/{name} iou"] = (counts.best()[1] if at is None else counts.at(at)).iou
    at = (thresholds or {}).get("change", {}).get("default")
    pooled = _pooled(found.change.values())
    for group, counts in sorted(found.change.items()):
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


def fit_calibration(found: Gathered) -> DenseCalibration:
    """Thresholds of highest F1: of boxes and masks by concept, of change for coarse and fine imagery and for both."""
    concepts = sorted({name for _, name in found.boxes})
    detect, confidence = {}, {}
    for name in concepts:
        groups = [images for (_, n), images in sorted(found.boxes.items()) if n == name]
        images = [image for group in groups for image in group]
        if sum(len(i.truth) for i in images) >= 5:
            detect[name] = best_f1_threshold(images)[0]
            confidence[name] = _box_confidence(images)
    everything = [image for images in found.boxes.values() for image in images]
    mask = {
        name: _pooled(c for (_, n), c in sorted(found.masks.items()) if n == name).best()[0]
        for name in sorted({n for _, n in found.masks})
    }
    change = {"default": _pooled(found.change.values()).best()[0]}
    for key, coarse in (("coarse", True), ("fine", False)):
        members = [c for group, c in found.change.items() if (group in COARSE_SETS) == coarse]
        if members:
            change[key] = _pooled(members).best()[0]
    return DenseCalibration(
        detect={"default": best_f1_threshold(everything)[0] if everything else 0.35, **detect},
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
