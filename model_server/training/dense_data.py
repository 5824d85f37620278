"""Training views of the dense branch: square crops at random scales with boxes, masks or change, and phrases to ask.

Scales are pixels of the view per pixel of the source, drawn so that an object comes in many sizes: what a detector
learns at one scale of one set it does not find at another. A view may reach over the image's edge; what lies there is
grey and does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model_server.text.concepts import CONCEPTS, DISTRACTORS
from model_server.training.concepts import (
    DISTRACTOR_SETS,
    FULL_SCENES,
    RIVALS,
    absent,
    boxed,
    masked,
    present,
)
from model_server.training.dense_windows import Window, degraded, middles, pixel_of, relit
from model_server.training.records import Record, load_image, read_records

PHRASES = 4  # asked of each view
MOST_OF_IT = 0.8  # of an image's area: a view of so much shows what is somewhere in the image
SOUGHT = {"ship", "airplane", "car"}  # boxes are also learned from being told that such a thing is somewhere
THINGS = tuple(c for c in CONCEPTS if c not in {"road", "water", "forest", "oil spill", "look-alike", "land"})


@dataclass(frozen=True)
class Share:
    """How often a set is drawn, and between which scales."""

    weight: float
    low: float
    high: float


BOX_SETS = {
    "inshore_ships": Share(0.38, 0.2, 1.2),
    "estonia_aerial": Share(0.28, 0.45, 2.0),
    "neon_trees": Share(0.12, 0.6, 2.0),
    "hrsid_sar": Share(0.10, 0.6, 2.5),
    "ucm": Share(0.12, 0.7, 1.8),
    "rsicd_aid": Share(0.10, 1.4, 2.6),  # no boxes: what is not there
}
MASK_SETS = {
    "epfl_roads": Share(0.25, 0.5, 2.2),
    "flood": Share(0.21, 0.4, 1.2),
    "amazon_forest": Share(0.06, 0.5, 1.6),
    "hrsid_sar": Share(0.08, 0.6, 2.2),
    "oil_spill_sar": Share(0.12, 0.35, 1.1),
    "ucm": Share(0.15, 0.75, 1.5),  # these two by labels of the whole image
    "rsicd_aid": Share(0.05, 1.0, 2.2),
    "inshore_ships": Share(0.04, 0.25, 0.8),  # these three by the middles of their boxes
    "estonia_aerial": Share(0.03, 0.6, 2.0),
    "neon_trees": Share(0.01, 0.7, 1.6),
}
CHANGE_SETS = {
    "oscd": Share(0.30, 0.9, 2.4),
    "sztaki_air": Share(0.28, 0.5, 1.6),
    "levir_dsifn": Share(0.16, 0.9, 1.8),
    "egy_bcd": Share(0.12, 0.9, 1.8),
    "sar_change": Share(0.06, 0.8, 1.8),
    "ucm": Share(0.08, 0.9, 1.6),  # single images: pairs of one image and itself in other light
}


@dataclass
class Scene:
    """A decoded record."""

    record: Record
    images: list[np.ndarray]  # uint8 [H, W, 3]
    mask: np.ndarray | None = None  # uint8 [H, W], class ids, or 0 / 255 of a change
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))

    @classmethod
    def load(cls, record: Record) -> Scene:
        path = record.change_mask or record.mask
        mask = None
        if path is not None:
            with Image.open(path) as image:
                mask = np.array(image.convert("L") if image.mode not in ("L", "P") else image, np.uint8)
        boxes = np.array([o.bbox for o in record.objects], np.float32).reshape(-1, 4)
        return cls(record, [load_image(p) for p in record.images], mask, boxes)


def read_scenes(data: Path, sets: Iterable[str], split: str, limit: int | None = None) -> list[Scene]:
    """Decode the records of the sets that are annotated, at most `limit` of a set."""
    scenes = []
    for name in sets:
        records = [r for r in read_records(data, [name], split) if r.objects or r.set != "neon_trees"]
        scenes += [Scene.load(r) for r in records[:: max(len(records) // limit, 1) if limit else 1]]
    return scenes


class PhraseBank:
    """Sentence vectors of every training phrase, by concept."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        self.vectors = vectors

    def draw(self, name: str, rng: np.random.Generator) -> Tensor:
        """One way to say a concept (or a distractor): a phrase, sometimes between two, always a little moved."""
        said = CONCEPTS[name].said if name in CONCEPTS else (name,)
        first, second = (self.vectors[said[int(i)]] for i in rng.integers(0, len(said), 2))
        if rng.random() < 0.25:  # the label itself, which most callers will use
            first = self.vectors[said[0]]
        mix = float(rng.uniform(0, 0.5)) if rng.random() < 0.4 else 0.0
        x = first * (1 - mix) + second * mix
        x = x + torch.from_numpy(rng.normal(0, 0.012, x.shape).astype(np.float32))
        return F.normalize(x, dim=-1)


@dataclass
class Boxes:
    """A batch of the box task."""

    images: Tensor  # uint8 [B, 3, S, S]
    phrases: Tensor  # [B, K, E]
    boxes: list[Tensor]  # per image [N, 4]
    meant: list[Tensor]  # per image bool [K, N]: box n is what phrase k means
    known: list[Tensor]  # per image bool [N]: False = only a fragment is seen, neither object nor background
    complete: list[Tensor]  # per image bool [K]: False = the set does not label k, which only its other objects deny
    somewhere: list[Tensor]  # per image bool [K]: k is in the view, nobody knows where


@dataclass
class Masks:
    """A batch of the mask task."""

    images: Tensor  # uint8 [B, 3, S, S]
    phrases: Tensor  # [B, K, E]
    target: Tensor  # float [B, K, S, S], 0 or 1
    weight: Tensor  # float [B, K, S, S]
    somewhere: Tensor  # bool [B, K]: the thing is in the view, nobody knows where; its weights are 0


MaskView = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # one view's fields of Masks, in their order
BoxView = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # likewise of Boxes


@dataclass
class Changes:
    """A batch of the change task."""

    before: Tensor  # uint8 [B, 3, S, S]
    after: Tensor  # uint8 [B, 3, S, S]
    target: Tensor  # float [B, S, S]
    weight: Tensor  # float [B, S, S]


class Views:
    """Draws batches of one task from decoded scenes."""

    def __init__(self, scenes: Sequence[Scene], shares: Mapping[str, Share], bank: PhraseBank) -> None:
        self.shares, self.bank = shares, bank
        self.groups = {name: [s for s in scenes if s.record.set == name] for name in shares}
        self.names = [name for name, group in self.groups.items() if group]
        weights = np.array([shares[name].weight for name in self.names])
        self.weights = weights / weights.sum()

    def draw_scene(self, rng: np.random.Generator) -> tuple[Scene, float]:
        name = self.names[int(rng.choice(len(self.names), p=self.weights))]
        share, group = self.shares[name], self.groups[name]
        scale = float(np.exp(rng.uniform(np.log(share.low), np.log(share.high))))
        return group[int(rng.integers(len(group)))], scale

    def boxes(self, rng: np.random.Generator, batch: int, side: int) -> Boxes:
        views = [self._boxes(rng, side) for _ in range(batch)]
        images, phrases, *lists = zip(*views, strict=True)
        return Boxes(torch.stack(images), torch.stack(phrases), *(list(part) for part in lists))

    def _boxes(self, rng: np.random.Generator, side: int) -> BoxView:
        scene, scale = self.draw_scene(rng)
        labels = [o.label for o in scene.record.objects]
        focus = None
        if labels and rng.random() < 0.8:
            kind = sorted(set(labels))[int(rng.integers(len(set(labels))))] if rng.random() < 0.4 else None
            rows = [i for i, name in enumerate(labels) if kind in (None, name)]
            x1, y1, x2, y2 = scene.boxes[rows[int(rng.integers(len(rows)))]]
            focus = (float(x1 + x2) / 2, float(y1 + y2) / 2)
        h, w = scene.images[0].shape[:2]
        window = Window.draw(rng, h, w, side, scale, focus)
        image = self._look(window, scene, rng)
        whole = window.corners(scene.boxes)
        seen = whole.clip(0, side)
        area, area_seen = ((b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (whole, seen))
        there = area_seen > 0
        known = (area_seen >= 0.4 * area) & ((seen[:, 2:] - seen[:, :2]).max(1, initial=0) >= 5)
        unplaced = present(scene.record) & SOUGHT if window.size**2 >= MOST_OF_IT * h * w else set()
        names = self._ask_boxes(scene.record, {labels[i] for i in np.flatnonzero(there & known)}, unplaced, rng)
        meant = np.array([[name in CONCEPTS and label in CONCEPTS[name].labels for label in labels] for name in names])
        meant = meant.reshape(len(names), len(labels))[:, there]
        phrases = torch.stack([self.bank.draw(name, rng) for name in names])
        sure = boxed(scene.record) | absent(scene.record) | set(DISTRACTORS)
        complete = torch.tensor([name in sure for name in names])
        somewhere = torch.tensor([name in unplaced for name in names])
        box, means, sees = (torch.from_numpy(part) for part in (seen[there], meant, known[there]))
        return image, phrases, box, means, sees, complete, somewhere

    def _ask_boxes(self, record: Record, visible: set[str], unplaced: set[str], rng: np.random.Generator) -> list[str]:
        """Concepts to ask: what is there, what is known to be absent, a distractor, and what the set does not label."""
        here = [n for n in sorted(boxed(record)) if CONCEPTS[n].labels & visible] + sorted(unplaced)
        others = [n for n in sorted((boxed(record) | absent(record)) & set(THINGS)) if n not in here]
        rng.shuffle(here)
        rng.shuffle(others)
        if record.set in DISTRACTOR_SETS and rng.random() < 0.3:
            others.insert(0, DISTRACTORS[int(rng.integers(len(DISTRACTORS)))])
        unlabelled = [n for n in THINGS if n not in boxed(record) and n not in absent(record)]
        if visible and unlabelled and (len(others) < PHRASES or rng.random() < 0.3):
            others.insert(0, unlabelled[int(rng.integers(len(unlabelled)))])
        names = [*here[: PHRASES - 1], *others] or unlabelled  # of some images nothing is known, and none is taught
        return (names * PHRASES)[:PHRASES]

    def _look(self, window: Window, scene: Scene, rng: np.random.Generator, which: int = 0) -> Tensor:
        sar = scene.record.modality == "sar"
        return degraded(relit(window.image(scene.images[which]), rng, 1.4), rng, sar)

    def masks(self, rng: np.random.Generator, batch: int, side: int) -> Masks:
        views = [self._masks(rng, side) for _ in range(batch)]
        return Masks(*(torch.stack(parts) for parts in zip(*views, strict=True)))

    def _masks(self, rng: np.random.Generator, side: int) -> MaskView:
        scene, scale = self.draw_scene(rng)
        record, source = scene.record, scene.mask
        if source is None:
            by_boxes = bool(record.objects)
            return (self._box_masks if by_boxes else self._scene_masks)(scene, scale, rng, side)
        classes = masked(record)
        names = sorted(classes)
        rng.shuffle(names)
        focus = pixel_of(np.isin(source, list(classes[names[0]])), rng) if names and rng.random() < 0.5 else None
        h, w = source.shape
        window = Window.draw(rng, h, w, side, scale, focus)
        out = absent(record)
        others = [n for n in sorted(out) if n not in names]
        rng.shuffle(others)
        if record.set in DISTRACTOR_SETS and rng.random() < 0.2:
            others.insert(0, DISTRACTORS[int(rng.integers(len(DISTRACTORS)))])
        rivals = sorted({rival for n in names[: PHRASES - 1] for rival in RIVALS.get(n, ())} - set(classes) - out)
        if rivals and rng.random() < 0.5:
            others.insert(0, rivals[int(rng.integers(len(rivals)))])
        asked = ([*names[: PHRASES - 1], *others] * PHRASES)[:PHRASES]
        inside = window.plane(np.ones((h, w), bool)) > 0.5
        target = torch.zeros(PHRASES, side, side)
        for k, name in enumerate(asked):
            if name in classes:
                target[k] = (window.plane(np.isin(source, list(classes[name]))) > 0.5).float()
        phrases = torch.stack([self.bank.draw(name, rng) for name in asked])
        weight = inside.float().expand(PHRASES, -1, -1).clone()
        for k, name in enumerate(asked):
            if name in rivals:  # unlabelled here: only what is labelled as something else denies it
                weight[k] *= torch.stack([target[i] for i, n in enumerate(asked) if name in RIVALS.get(n, ())]).amax(0)
        return self._look(window, scene, rng), phrases, target, weight, torch.zeros(PHRASES, dtype=torch.bool)

    def _scene_masks(self, scene: Scene, scale: float, rng: np.random.Generator, side: int) -> MaskView:
        """Masks as far as labels of the whole image tell: throughout, nowhere, or somewhere in it."""
        record = scene.record
        full = FULL_SCENES.get(record.scene or "")
        there, out = sorted(present(record) - {full}), sorted(absent(record))
        rng.shuffle(there)
        rng.shuffle(out)
        asked = ([*([full] if full else []), *there[: PHRASES // 2], *out] * PHRASES)[:PHRASES]
        h, w = scene.images[0].shape[:2]
        window = Window.draw(rng, h, w, side, scale, None)
        inside = window.plane(np.ones((h, w), bool)) > 0.5
        target = torch.zeros(PHRASES, side, side)
        weight = 0.5 * inside.float().expand(PHRASES, -1, -1).clone()  # the labels are right on most pixels only
        somewhere = torch.tensor([name in there for name in asked])
        weight[somewhere] = 0
        somewhere &= window.size**2 >= MOST_OF_IT * h * w  # else it may lie outside the view
        target[[k for k, name in enumerate(asked) if name == full]] = inside.float()
        phrases = torch.stack([self.bank.draw(name, rng) for name in asked])
        return self._look(window, scene, rng), phrases, target, weight, somewhere

    def _box_masks(self, scene: Scene, scale: float, rng: np.random.Generator, side: int) -> MaskView:
        """Masks as far as boxes tell: in the middle of one is the thing, outside all is none, between is unknown."""
        labels = [o.label for o in scene.record.objects]
        x1, y1, x2, y2 = scene.boxes[int(rng.integers(len(labels)))]
        h, w = scene.images[0].shape[:2]
        window = Window.draw(rng, h, w, side, scale, (float(x1 + x2) / 2, float(y1 + y2) / 2))
        here = [name for name in sorted(boxed(scene.record)) if CONCEPTS[name].labels & set(labels)]
        others = sorted((boxed(scene.record) | absent(scene.record)) - set(here))
        rng.shuffle(here)
        rng.shuffle(others)
        asked = ([*here[: PHRASES - 1], *others] * PHRASES)[:PHRASES]
        inside = window.plane(np.ones((h, w), bool)) > 0.5
        target = torch.zeros(PHRASES, side, side)
        weight = 0.5 * inside.float().expand(PHRASES, -1, -1).clone()
        for k, name in enumerate(asked):
            rows = [label in CONCEPTS[name].labels for label in labels]
            middle, unsure = middles(window.corners(scene.boxes[rows]), side, 0.4 if name == "ship" else 0.75)
            target[k] = middle.float()
            weight[k, unsure] = 0
        phrases = torch.stack([self.bank.draw(name, rng) for name in asked])
        return self._look(window, scene, rng), phrases, target, weight, torch.zeros(PHRASES, dtype=torch.bool)

    def changes(self, rng: np.random.Generator, batch: int, side: int) -> Changes:
        views = [self._changes(rng, side) for _ in range(batch)]
        return Changes(*(torch.stack(parts) for parts in zip(*views, strict=True)))

    def _changes(self, rng: np.random.Generator, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A pair, sometimes in reverse order, sometimes one image with itself in other light: nothing changed."""
        scene, scale = self.draw_scene(rng)
        changed = scene.mask > 127 if scene.mask is not None else np.zeros(scene.images[0].shape[:2], bool)
        focus = pixel_of(changed, rng) if rng.random() < 0.6 else None
        h, w = scene.images[0].shape[:2]
        window = Window.draw(rng, h, w, side, scale, focus)
        first, second = (0, len(scene.images) - 1) if rng.random() < 0.5 else (len(scene.images) - 1, 0)
        same = rng.random() < 0.12
        before, moved = self._look(window, scene, rng, first), window
        if rng.random() < 0.3:  # pairs are rarely registered better than to a pixel
            dx, dy = (int(v) for v in rng.integers(-1, 2, 2))
            moved = replace(window, left=window.left + dx, top=window.top + dy)
        if len(scene.images) == 1 or same:
            after = self._look(moved, scene, rng, first)
            target = torch.zeros(side, side)
        else:
            after = self._look(moved, scene, rng, second)
            target = (window.plane(changed) > 0.5).float()
        return before, after, target, (window.plane(np.ones((h, w), bool)) > 0.5).float()
