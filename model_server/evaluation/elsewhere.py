"""Ships where no box is labelled, of sensors and scales that no box of training had (protocol `elsewhere`).

Of UC Merced training does use what its labels of whole images say of ships.

UC Merced says of every image whether a ship is on it (0.3 m, harbours from the air); an OpenSARShip chip has one ship
in its middle, of known length (Sentinel-1, 10 m).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from model_server.evaluation.asking import Model
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.dense_metrics import Scores, from_counts
from model_server.evaluation.looking import as_arrays, find
from model_server.evaluation.results import Controls, Results, Row
from model_server.protocol import TileObjects
from model_server.training.records import Record

SHIP = "ship"
PRESENCE_SETS, CHIP_SETS = ("ucm",), ("opensarship",)
FACTOR = 2.0  # within which a length is called right


def evaluate_elsewhere(model: Model, data: EvaluatedSet, records: Sequence[Record], results: Results) -> None:
    """Add the rows of a set that this protocol is for; nothing for others."""
    if data.name in PRESENCE_SETS:
        labelled = [record for record in records if SHIP in record.presence]
        if labelled:
            _presence(model, data, labelled, results)
    elif data.name in CHIP_SETS and records:
        _chips(model, data, records, results)


def _ask(model: Model, data: EvaluatedSet, records: Sequence[Record]) -> None:
    find(model, data, records, lambda _: (SHIP,), "ships")
    find(model, data, records, lambda _: (SHIP,), "ships, blind", blind=True)


def _given(data: EvaluatedSet, record: Record, blind: bool) -> np.ndarray:
    """Boxes worth giving, [N, 4]."""
    answer: TileObjects = data.found[record.id, SHIP, blind]
    boxes, _, keep = as_arrays(answer)
    return boxes[keep]


def _presence(model: Model, data: EvaluatedSet, records: Sequence[Record], results: Results) -> None:
    _ask(model, data, records)
    truth = np.array([record.presence[SHIP] for record in records])
    ours, blind = (
        _agreement(np.array([len(_given(data, record, hidden)) > 0 for record in records]), truth)
        for hidden in (False, True)
    )
    always = _agreement(np.ones(len(truth), bool), truth)
    for metric in ("f1", "precision", "recall"):
        beside: Controls = {"always": getattr(always, metric), "blind": getattr(blind, metric)}
        value = getattr(ours, metric)
        row = Row(data.name, data.split, "ground", "elsewhere", f"presence_{metric}", value, len(records), beside)
        results.rows.append(row)


def _agreement(said: np.ndarray, truth: np.ndarray) -> Scores:
    return from_counts(int((said & truth).sum()), int((said & ~truth).sum()), int((~said & truth).sum()))


def _chips(model: Model, data: EvaluatedSet, records: Sequence[Record], results: Results) -> None:
    _ask(model, data, records)
    ours = _figures(records, lambda record: _given(data, record, False))
    blind = _figures(records, lambda record: _given(data, record, True))
    whole = _figures(records, lambda record: np.array([[0, 0, record.width, record.height]], np.float64))
    for metric, (value, n) in ours.items():
        beside: Controls = {"whole": whole[metric][0], "blind": blind[metric][0]}
        results.rows.append(Row(data.name, data.split, "ground", "elsewhere", metric, value, n, beside))


def _figures(records: Sequence[Record], boxes_of: Callable[[Record], np.ndarray]) -> dict[str, tuple[float, int]]:
    """Each measure and on how many chips it was taken."""
    covered, sized, around, many = [], [], [], []
    for record in records:
        boxes = boxes_of(record)
        middle = _covering(boxes, record.width / 2, record.height / 2)
        covered.append(bool(middle.any()))
        many.append(len(boxes))
        places = [(x * record.width, y * record.height) for x in (0.25, 0.75) for y in (0.25, 0.75)]
        around.append(float(np.mean([_covering(boxes, x, y).any() for x, y in places])))
        if record.length_m and record.gsd_m:
            ratio = (boxes[middle, 2:] - boxes[middle, :2]).max(1) * record.gsd_m / record.length_m
            sized.append(bool(((ratio <= FACTOR) & (ratio >= 1 / FACTOR)).any()))
    values = {"centre": covered, "centre_length": sized, "off_centre": around, "boxes": many}
    return {name: (float(np.mean(each)), len(each)) for name, each in values.items() if each}


def _covering(boxes: np.ndarray, x: float, y: float) -> np.ndarray:
    """Which boxes of [N, 4] hold a point, bool [N]."""
    return (boxes[:, 0] <= x) & (boxes[:, 1] <= y) & (boxes[:, 2] >= x) & (boxes[:, 3] >= y)
