"""Boxes, masks and change: the dense branch of a loaded model, asked in batches.

Every query becomes looks at its image: one at the scale of its concept, or several where objects are searched over
scales (working_scale). Looks of one padded size go through the network together, and queries on the same pixels at
the same scale share one look, also with later ones while its features are kept; so do pairs that share an image. What
comes back lies on the pixels of the image that was given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from model_server.batching.feature_cache import ByteCache, image_key
from model_server.calibration import DenseCalibration, Logistic
from model_server.dense.known_phrases import KnownPhrases, Meaning
from model_server.dense.scale_search import Sighting, combined
from model_server.dense.working_scale import bounded, box_scales, change_kind, change_scale, mask_scales, suited
from model_server.model.dense import DenseBranch, Found, Maps, early_maps, objects_of
from model_server.model.looks import Frame, stacked
from model_server.model.transfer import sent
from model_server.model.vision import Backbone
from model_server.protocol import Modality, TileChange, TileMasks, TileObjects
from model_server.query import Query
from model_server.relations import Relation, parse

FLOOR = 0.02  # calibrated score of the least object that is given
KEPT_SHARE = 1 / 16  # of the cache: features of a larger look would push out those of a hundred small ones
PASS_PIXELS = 2**20  # looked at in one pass: enough to keep a processor busy, and little memory

_T = TypeVar("_T")


@dataclass
class _Look:
    """One image at one scale, and which queries it answers with boxes or masks."""

    image: np.ndarray
    digest: bytes
    frame: Frame
    scale: float
    boxes: list[int] = field(default_factory=list)
    masks: list[tuple[int, list[int]]] = field(default_factory=list)  # each with rows of its labels


@dataclass(frozen=True)
class _Pair:
    """Two images of one size, at one scale."""

    query: int
    before: np.ndarray
    after: np.ndarray
    frame: Frame
    scale: float

    @cached_property
    def keys(self) -> tuple[Hashable, Hashable]:
        """Of the maps of both."""
        before, after = (("maps", image_key(image), self.frame.seen) for image in (self.before, self.after))
        return before, after


class DensePerceiver:
    """The branch with what it needs. Not thread-safe.

    Args:
        backbone: of the model, whose first blocks are shared; norms folded.
        embed: phrases -> unit sentence vectors [N, S].
        cache: where features of looks are kept for the next phrase or class; None while weights change.
    """

    def __init__(self, backbone: Backbone, branch: DenseBranch, calibration: DenseCalibration,
                 embed: Callable[[Sequence[str]], Tensor], device: torch.device,
                 cache: ByteCache[Any] | None = None) -> None:  # fmt: skip
        self.backbone, self.branch, self.calibration, self.device = backbone, branch, calibration, device
        self.phrases = KnownPhrases(embed)
        self.cache = cache

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query]) -> list[TileObjects | TileMasks | TileChange]:
        """Answer ground, segment and detect_change queries, in order.

        A ground query for a single thing among its like ("the largest ship") is answered by that one box.
        The text of a detect_change query is not looked at: the branch knows changed from unchanged only.
        """
        relations = [parse(q.text) if q.task == "ground" else None for q in queries]
        queries = [replace(q, text=r.head) if r else q for q, r in zip(queries, relations, strict=True)]
        asked = [text for q in queries for text in ((q.text,) if q.task == "ground" else q.labels)]
        meanings = self.phrases.read(asked)
        sightings: dict[int, list[Sighting]] = defaultdict(list)
        masks = {i: self._blank(q, meanings) for i, q in enumerate(queries) if q.task == "segment"}
        drawn: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # query and label -> logits of each look
        for look, features in self._features(_looks(queries, meanings)):
            boxed = [meanings[queries[i].text] for i in look.boxes]
            for i, seen in zip(look.boxes, self._sightings(look, features, boxed), strict=True):
                sightings[i].append(seen)
            for i, rows in look.masks:
                vectors = torch.stack([meanings[queries[i].labels[row]].vector for row in rows])
                logits = look.frame.logits_on_source(self.branch.segment(features, vectors[None])[0])
                for row, mask in zip(rows, logits, strict=True):
                    drawn[i, row].append(mask)
        for (i, row), looks in drawn.items():
            masks[i].probabilities[row] = _bytes(torch.stack(looks).mean(0))
        answers: dict[int, TileObjects | TileMasks | TileChange] = dict(masks)
        answers |= {
            i: self._objects(combined(seen), meanings[queries[i].text], queries[i]) for i, seen in sightings.items()
        }
        for i, relation in enumerate(relations):
            answer = answers.get(i)
            if relation is not None and isinstance(answer, TileObjects):
                answers[i] = _singled_out(answer, relation, queries[i].image)
        answers |= self._changes(queries)
        return [answers[i] for i in range(len(queries))]

    def _maps(self, images: Tensor) -> Maps:
        return self.branch.maps(early_maps(self.backbone, sent(images, self.device), self.branch.config.shared))

    def _features(self, looks: Sequence[_Look]) -> Iterator[tuple[_Look, Tensor]]:
        """Every look with its features [1, C, H/4, W/4]; those kept from before first."""
        missing = []
        for look in looks:
            known = None if self.cache is None else self.cache.get(_key(look))
            if known is None:
                missing.append(look)
            else:
                yield look, known
        for group in _passes(missing, lambda look: look.frame, 1):
            x = stacked([look.frame for look in group], [look.image for look in group])
            for look, features in zip(group, self.branch.features(self._maps(x)).split(1), strict=True):
                if self.cache is not None and features.nbytes <= KEPT_SHARE * self.cache.limit:
                    self.cache.put(_key(look), features.clone(), features.nbytes)
                yield look, features

    def _sightings(self, look: _Look, features: Tensor, asked: Sequence[Meaning]) -> list[Sighting]:
        """Each phrase's objects in one look."""
        if not asked:
            return []
        found = self.branch.detect(features, torch.stack([meaning.vector for meaning in asked])[None])
        found = Found(found.heat.cpu(), found.distances.cpu(), found.quality.cpu())  # suppression is a loop of its own
        sightings = []
        for k in range(len(asked)):
            objects = objects_of(found, 0, k)  # best first
            boxes = look.frame.boxes_on_source(objects.boxes)
            keep = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 0.5
            sightings.append(Sighting(look.scale, boxes[keep], objects.scores[keep]))
        return sightings

    def _objects(self, seen: Sighting, meaning: Meaning, query: Query) -> TileObjects:
        fitted, (height, width) = self.calibration, query.image.shape[:2]
        confidence = _of(fitted.box_confidence, meaning.concept, query.modality, query.gsd_m)
        threshold = torch.tensor(_of(fitted.detect, meaning.concept, query.modality, query.gsd_m))
        scores = _calibrated(seen.scores, confidence)
        enough = scores >= FLOOR
        limit = torch.tensor([width, height, width, height])  # which a mean of boxes may pass by rounding
        return TileObjects(
            boxes=[(x1, y1, x2, y2) for x1, y1, x2, y2 in seen.boxes[enough].clamp(min=0).minimum(limit).tolist()],
            scores=scores[enough].tolist(),
            threshold=float(_calibrated(threshold, confidence)),
            known=meaning.known,
            scale=seen.scale,
        )

    def _blank(self, query: Query, meanings: dict[str, Meaning]) -> TileMasks:
        """The answer to a segment query, its probabilities yet to be filled."""
        meant = [meanings[label] for label in query.labels]
        return TileMasks(
            labels=list(query.labels),
            thresholds=[_of(self.calibration.mask, m.concept) for m in meant],
            known=[m.known for m in meant],
            scale=max(
                bounded(scale, query.image)
                for m in meant
                for scale in mask_scales(m.concept, query.modality, query.gsd_m)
            ),
            probabilities=np.zeros((len(query.labels), *query.image.shape[:2]), np.uint8),
        )

    def _changes(self, queries: Sequence[Query]) -> dict[int, TileChange]:
        pairs = []
        for i, query in enumerate(queries):
            if query.task == "detect_change":
                if query.after is None or query.after.shape != query.image.shape:
                    raise ValueError("a detect_change query needs `after`, an array of the shape of `image`")
                scale = bounded(change_scale(query.gsd_m), query.image)
                pairs.append(_Pair(i, query.image, query.after, Frame.of(query.image, scale), scale))
        answers = {}
        for group in _passes(pairs, lambda pair: pair.frame, 2):
            known = self._maps_of(group)
            before, after = (_joined([known[pair.keys[side]] for pair in group]) for side in (0, 1))
            logits = self.branch.change(before, after)
            for pair, row in zip(group, logits, strict=True):
                answers[pair.query] = TileChange(
                    threshold=self._change_threshold(queries[pair.query].gsd_m),
                    scale=pair.scale,
                    probabilities=_bytes(pair.frame.logits_on_source(row[None]))[0],
                )
        return answers

    def _maps_of(self, group: Sequence[_Pair]) -> dict[Hashable, Maps]:
        """Of each image of some pairs, whose looks have one padded size: a later pair may show it again, as in a series
        of images each is once `after` and once `before`."""
        wanted = {
            key: (pair.frame, image)
            for pair in group
            for key, image in zip(pair.keys, (pair.before, pair.after), strict=True)
        }
        known: dict[Hashable, Maps] = {}
        for key in wanted:
            found = None if self.cache is None else self.cache.get(key)
            if found is not None:
                known[key] = found
        missing = {key: look for key, look in wanted.items() if key not in known}
        if missing:
            frames, images = zip(*missing.values(), strict=True)
            maps = self._maps(stacked(frames, images))
            for i, key in enumerate(missing):
                known[key] = {s: m[i : i + 1] for s, m in maps.items()}
                self._keep(key, known[key])
        return known

    def _keep(self, key: Hashable, maps: Maps) -> None:
        size = sum(m.nbytes for m in maps.values())
        if self.cache is not None and size <= KEPT_SHARE * self.cache.limit:
            self.cache.put(key, {s: m.clone() for s, m in maps.items()}, size)  # not the whole batch with them

    def _change_threshold(self, gsd_m: float | None) -> float:
        return _of(self.calibration.change, change_kind(gsd_m))


def _singled_out(found: TileObjects, relation: Relation, image: np.ndarray) -> TileObjects:
    """Of the objects at the threshold the one that is meant; all of them as they are where none reaches it."""
    boxes, scores = np.array(found.boxes).reshape(-1, 4), np.array(found.scores)
    good = scores >= found.threshold
    if not good.any():
        return found
    row = int(np.flatnonzero(good)[relation.pick(boxes[good], scores[good], (0, 0, image.shape[1], image.shape[0]))])
    return found.model_copy(update={"boxes": [found.boxes[row]], "scores": [found.scores[row]]})


def _looks(queries: Sequence[Query], meanings: dict[str, Meaning]) -> list[_Look]:
    """What has to be looked at, each image and scale once."""
    looks: dict[Hashable, _Look] = {}

    def at(query: Query, scale: float) -> _Look:
        scale = bounded(scale, query.image)
        look = _Look(query.image, query.digest, Frame.of(query.image, scale), scale)
        return looks.setdefault(_key(look), look)

    for i, query in enumerate(queries):
        if query.task == "ground":
            scales = box_scales(meanings[query.text].concept, query.modality, query.gsd_m)
            for look in {id(look): look for look in (at(query, scale) for scale in scales)}.values():
                look.boxes.append(i)
        elif query.task == "segment":
            rows: dict[float, list[int]] = defaultdict(list)
            for row, label in enumerate(query.labels):
                for scale in mask_scales(meanings[label].concept, query.modality, query.gsd_m):
                    rows[scale].append(row)
            for scale, some in rows.items():
                at(query, scale).masks.append((i, some))
    return list(looks.values())


def _key(look: _Look) -> Hashable:
    return "look", look.digest, look.frame.seen


def _joined(maps: Sequence[Maps]) -> Maps:
    """One batch of the maps of several images."""
    return {stride: torch.cat([one[stride] for one in maps]) for stride in maps[0]}


def _passes(items: Sequence[_T], frame_of: Callable[[_T], Frame], images: int) -> Iterator[list[_T]]:
    """Items of one padded size together, as many as `PASS_PIXELS` allow; each holds so many images."""
    groups: dict[tuple[int, int], list[_T]] = defaultdict(list)
    for item in items:
        groups[frame_of(item).padded].append(item)
    for (height, width), group in groups.items():
        most = max(PASS_PIXELS // (height * width * images), 1)
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _bytes(logits: Tensor) -> np.ndarray:
    """Probabilities as 0..255, uint8 of the same shape."""
    return logits.sigmoid().mul(255).round().byte().cpu().numpy()


def _calibrated(scores: Tensor, confidence: Logistic) -> Tensor:
    return torch.sigmoid(confidence.slope * torch.logit(scores.clamp(1e-4, 1 - 1e-4)) + confidence.offset)


def _of(fitted: Mapping[str, _T], key: str | None, modality: Modality = "optical", gsd_m: float | None = None) -> _T:
    found = suited(fitted, key, modality, gsd_m)
    return fitted["default"] if found is None else found
