"""Change masks against labelled ones (protocol `binary`), change claimed where nothing changed (`still`), and what a
caption of the change claims (`facts`).
"""

from __future__ import annotations

import numpy as np
import torch

from model_server.evaluation.asking import Model, mean_colour, progress
from model_server.evaluation.change_facts import Pair, add_facts
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.dense_metrics import MaskTally
from model_server.evaluation.labelled import load_mask
from model_server.evaluation.looking import changed
from model_server.evaluation.results import Results, Row
from model_server.training.dense_windows import relit
from model_server.training.records import load_image

MEASURES = ("f1", "iou", "precision", "recall")


def evaluate_change(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the change rows of one set of pairs, all pixels of all pairs counted together."""
    records = [record for record in data.records if record.change_mask and len(record.images) == 2]
    if not records:
        results.notes.append(f"{data.name}: no change masks in split {data.split!r}, so no change row")
        return
    ours, dropped, everything = MaskTally(), MaskTally(), MaskTally()
    found, blinded = list[Pair](), list[Pair]()
    still = {"identical": MaskTally(), "relit": MaskTally()}
    for number, record in enumerate(progress(records, f"{data.name} change", len(records))):
        before, after = (load_image(path) for path in record.images)
        assert record.change_mask is not None
        truth = load_mask(record.change_mask) > 127
        found.append((changed(model, record, before, after), truth))
        blinded.append((changed(model, record, mean_colour(before), after), truth))
        ours.add(*found[-1])
        dropped.add(*blinded[-1])
        everything.add(np.ones_like(truth), truth)
        for name, other in (("identical", before), ("relit", _in_other_light(before, number))):
            still[name].add(changed(model, record, before, other), np.zeros_like(truth))
    controls = {
        "all_changed": everything.scores(),
        "none_changed": MaskTally().scores(),
        "dropped_before": dropped.scores(),
    }
    for metric in MEASURES:
        beside = {name: getattr(scores, metric) for name, scores in controls.items()}
        value = getattr(ours.scores(), metric)
        results.rows.append(Row(data.name, data.split, "detect_change", "binary", metric, value, len(records), beside))
    add_facts(data, found, blinded, results)
    for name, tally in still.items():
        share = tally.false / tally.total
        metric = f"false_change/{name}"
        results.rows.append(Row(data.name, data.split, "detect_change", "still", metric, share, len(records)))


def _in_other_light(image: np.ndarray, number: int) -> np.ndarray:
    """The image with other contrast, brightness, gamma and colour; the same in every run."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return np.ascontiguousarray(relit(x, np.random.default_rng(number)).permute(1, 2, 0).numpy())
