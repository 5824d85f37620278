"""What the image heads learn from: scene labels, object presence, caption words, and which captions are alike."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_server.text.names import readable
from model_server.training.records import Record

# Names of the sets that mean nearly the same place. A scene is no counter-example to the others of its group.
ALIKE: tuple[frozenset[str], ...] = (
    frozenset({"agricultural", "farmland"}),
    frozenset({"harbor", "port"}),
    frozenset({"baseball diamond", "baseball field"}),
    frozenset({"parking lot", "parking"}),
    frozenset({"overpass", "viaduct", "freeway", "intersection", "bridge"}),
    frozenset({"runway", "airport", "airplane"}),
    frozenset({"buildings", "commercial", "center", "industrial", "school", "church", "square"}),
    frozenset({"tennis court", "playground", "park", "stadium"}),
    frozenset({"chaparral", "bare land", "desert", "meadow"}),
    frozenset({"mobile home park", "dense residential", "medium residential", "sparse residential", "resort"}),
    frozenset({"golf course", "park", "meadow", "resort"}),
    frozenset({"river", "pond", "bridge"}),
)
_STOP = frozenset("a an the is are of in on to and with at by some there it this that its be as from for or".split())


def words(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation."""
    return re.findall(r"[a-z0-9']+", caption.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The names behind the heads' rows, in order. Sorted, so that every process builds the same."""

    labels: tuple[str, ...]
    objects: tuple[str, ...]
    concepts: tuple[str, ...]

    @classmethod
    def build(cls, records: Sequence[Record], min_count: int = 8) -> Vocabulary:
        counts = Counter(w for r in records for w in {w for c in r.captions for w in words(c)} - _STOP)
        return cls(
            labels=tuple(sorted({readable(r.scene) for r in records if r.scene})),
            objects=tuple(sorted({readable(o) for r in records for o in r.presence})),
            concepts=tuple(sorted(w for w, n in counts.items() if n >= min_count)),
        )


@dataclass(frozen=True)
class ImageTargets:
    """Targets of N images. -1 or a zero `has_*` marks what is not annotated."""

    scene: np.ndarray  # int64 [N], row of Vocabulary.labels
    group: np.ndarray  # int64 [N], index of the image's set: its labels are the rows of `closed`
    closed: np.ndarray  # bool [sets, labels], the labels that a set chooses among
    open: np.ndarray  # bool [labels, labels], row = true label: labels that count as wrong over all sets
    presence: np.ndarray  # float32 [N, objects], -1 unknown
    concepts: np.ndarray  # float32 [N, concepts], share of the captions with the word
    has_captions: np.ndarray  # bool [N]
    tfidf: np.ndarray  # float32 [N, concepts], unit rows: which images are described alike

    @classmethod
    def build(cls, records: Sequence[Record], vocabulary: Vocabulary) -> ImageTargets:
        label_row = {name: i for i, name in enumerate(vocabulary.labels)}
        concept_row = {name: i for i, name in enumerate(vocabulary.concepts)}
        sets = sorted({r.set for r in records})
        n = len(records)
        scene = np.full(n, -1, np.int64)
        group = np.array([sets.index(r.set) for r in records], np.int64)
        closed = np.zeros((len(sets), len(vocabulary.labels)), bool)
        presence = np.full((n, len(vocabulary.objects)), -1, np.float32)
        share = np.zeros((n, len(vocabulary.concepts)), np.float32)
        for i, record in enumerate(records):
            if record.scene:
                scene[i] = label_row[readable(record.scene)]
                closed[group[i], scene[i]] = True
            for name, value in record.presence.items():
                presence[i, vocabulary.objects.index(readable(name))] = float(value)
            for caption in record.captions:
                for row in {concept_row[w] for w in words(caption) if w in concept_row}:
                    share[i, row] += 1 / len(record.captions)
        idf = np.log(max(n, 1) / (1 + (share > 0).sum(0))).clip(min=0).astype(np.float32)
        tfidf = share * idf
        tfidf /= np.linalg.norm(tfidf, axis=1, keepdims=True).clip(min=1e-6)
        has = np.array([bool(r.captions) for r in records])
        return cls(scene, group, closed, _open_labels(vocabulary.labels), presence, share, has, tfidf)


def _open_labels(labels: Sequence[str]) -> np.ndarray:
    wrong = ~np.eye(len(labels), dtype=bool)
    for group in ALIKE:
        rows = [i for i, name in enumerate(labels) if name in group]
        wrong[np.ix_(rows, rows)] = False
    return wrong


def cosine_decay(step: int, steps: int, warm_up: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))
