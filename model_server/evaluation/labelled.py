"""What the labels of a set mean to a model that takes phrases: words for them, truth for them, and what they deny."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, UnidentifiedImageError

from model_server.evaluation.dataset import EvaluatedSet
from model_server.text.concepts import CONCEPTS, DISTRACTORS, Concept
from model_server.text.names import readable
from model_server.text.questions import askable_labels
from model_server.training.concepts import (
    ABSENT_IN_SCENE,
    ABSENT_WITH,
    DISTRACTOR_SETS,
    ONLY_IN_SCENE,
    PRESENT_IN_SCENE,
    SCENE_SETS,
    UNLABELLED,
    boxed,
)
from model_server.training.records import DataError, Record

BACKGROUND = "background"
# Concepts with an outline of their own, of which one can say that an image holds none; land or water have no count.
NEVER = 6  # things that no image of a set holds, asked of each of its images; others of other images
THINGS = frozenset(CONCEPTS) - {"road", "water", "forest", "oil spill", "look-alike", "land"}


def concept_of(label: str) -> Concept | None:
    """The narrowest concept that covers a label: `car` is a car before it is a vehicle. None for an unknown label."""
    covering = [concept for concept in CONCEPTS.values() if label in concept.labels]
    return min(covering, key=lambda concept: len(concept.labels), default=None)


def words_for(label: str) -> str:
    """A label as people say it: `oil_spill` -> "oil spill", `look_alike` -> "look-alike"."""
    concept, words = concept_of(label), readable(label)
    return concept.name if concept and re.sub(r"\W", " ", concept.name) == words else words


def other_words(label: str) -> tuple[str, ...]:
    """The ways to say a label that no training used; none for an unknown label."""
    concept = concept_of(label)
    return concept.held_out if concept else ()


def box_labels(data: EvaluatedSet) -> list[str]:
    """Every label that the set has boxes of, in the evaluated records or in training, sorted."""
    return sorted({o.label for record in [*data.records, *data.train] for o in record.objects})


def true_boxes(record: Record, label: str) -> np.ndarray:
    """float64 [N, 4] of one label, in pixels of the image."""
    return np.array([o.bbox for o in record.objects if o.label == label], np.float64).reshape(-1, 4)


def mask_values(record: Record) -> dict[str, int]:
    """The classes that a record's mask can be trusted on, and their pixel values; background is no class."""
    unlabelled = UNLABELLED.get(record.set, frozenset())
    return {
        name: value
        for value, name in sorted(record.mask_classes.items())
        if name != BACKGROUND and words_for(name) not in unlabelled
    }


def load_mask(path: Path) -> np.ndarray:
    """Decode a mask to uint8 [H, W]: class ids, or 0 and 255 of a change. Raises DataError where that fails."""
    try:
        with Image.open(path) as image:
            return np.array(image if image.mode in ("L", "P") else image.convert("L"), np.uint8)
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: not a mask that can be decoded ({error})") from error


def denied(record: Record) -> list[str]:
    """Phrases of things that the labels say are not on this image, the same in every run; none where all is silent."""
    there = {o.label for o in record.objects}
    names = {name for name in boxed(record) if not CONCEPTS[name].labels & there}
    if record.presence:
        absent = [label for label in askable_labels(record.presence) if not record.presence[label]]
        names |= {name for label in absent for name in ABSENT_WITH.get(label, ())}
        names |= set(ABSENT_IN_SCENE.get(record.scene or "", ()))
    elif record.set in SCENE_SETS and record.scene:
        names |= {name for name, scenes in ONLY_IN_SCENE.items() if record.scene not in scenes}
    elif record.set in UNLABELLED:
        unlabelled = UNLABELLED[record.set]
        names |= {c.name for c in CONCEPTS.values() if c.name not in unlabelled and not c.labels & there}
    elif not boxed(record):
        return []
    never = Random(record.id).sample(DISTRACTORS, NEVER) if record.set in DISTRACTOR_SETS else []
    return sorted(names & THINGS) + sorted(never)


def affirmed(record: Record) -> list[str]:
    """Phrases of things that the labels say are on this image, sorted."""
    names = {concept.name for o in record.objects if (concept := concept_of(o.label))}
    names |= {ABSENT_WITH[label][0] for label, there in record.presence.items() if there and label in ABSENT_WITH}
    if not record.presence and record.set in SCENE_SETS:
        names |= set(PRESENT_IN_SCENE.get(record.scene or "", ()))
    return sorted(names & THINGS)
