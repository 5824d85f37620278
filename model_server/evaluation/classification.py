"""Scene class over the closed list of a set's classes (protocol `top1`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from model_server.evaluation.answer_metrics import expected_calibration_error
from model_server.evaluation.asking import Model, ask, mean_colour
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.results import Results, Row
from model_server.perceiver import Query
from model_server.protocol import TileClasses
from model_server.training.records import Record, load_image


def evaluate_classes(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the scene rows of one set: `accuracy` and the calibration error `ece` of the highest score."""
    records = [record for record in data.records if record.scene]
    if not records:
        results.notes.append(f"{data.name}: no scene classes in split {data.split!r}, so no classification row")
        return
    truth = np.array([data.scenes.index(record.scene or "") for record in records])
    labels = tuple(scene.replace("_", " ") for scene in data.scenes)
    title = f"{data.name} scenes"
    scores = _scores(model, records, labels, title, blind=False)
    correct = scores.argmax(axis=1) == truth
    blind = _scores(model, records, labels, f"{title}, blind", blind=True).argmax(axis=1) == truth
    seen = Counter(record.scene for record in data.train if record.scene)
    majority = None
    if seen:
        commonest = max(sorted(seen), key=lambda scene: seen[scene])
        majority = float(np.mean(truth == data.scenes.index(commonest)))
    else:
        results.notes.append(f"{data.name}: no training records, so no majority class")
    controls = {"majority": majority, "blind": float(blind.mean())}
    measures = (
        ("accuracy", float(correct.mean()), controls),
        ("ece", expected_calibration_error(scores.max(axis=1).tolist(), correct), {}),
    )
    for metric, value, beside in measures:
        results.rows.append(Row(data.name, data.split, "classify", "top1", metric, value, len(records), beside))


def _scores(model: Model, records: Sequence[Record], labels: tuple[str, ...], title: str, blind: bool) -> np.ndarray:
    answers = ask(model, _queries(records, labels, blind), len(records), TileClasses, title)
    # The answer says which score belongs to which label; the order of the list that was asked about counts here.
    return np.array([[dict(zip(a.labels, a.scores, strict=True))[label] for label in labels] for a in answers])


def _queries(records: Sequence[Record], labels: tuple[str, ...], blind: bool) -> Iterable[Query]:
    for record in records:
        image = load_image(record.images[0])
        yield Query("classify", mean_colour(image) if blind else image, labels=labels)
