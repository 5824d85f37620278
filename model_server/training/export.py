"""From finished stages to a checkpoint folder, and its calibration on validation data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.calibration import Calibration, Logistic
from model_server.checkpoints.store import save_calibration, save_checkpoint
from model_server.evaluation.caption_metrics import rouge_l, tokenize
from model_server.perceiver import Perceiver, Query
from model_server.protocol import TileAnswer, TileCaption, TileClasses, TileVqa
from model_server.text.answers import normalise
from model_server.text.comparison import read_comparison
from model_server.text.questions import presence_questions
from model_server.training.images import thinned
from model_server.training.language import LanguageTrainer
from model_server.training.records import Record, load_image, read_records

BATCH = 32


FINISHED = ("answers", "polish", "language")  # the last of them that there is, is exported


def export(trainer: LanguageTrainer, folder: Path) -> None:
    """Write the averaged model of the last finished stage of a run, without calibration yet."""
    last = next(path for stage in FINISHED if (path := trainer.run.run / f"{stage}.pt").exists())
    trainer.average.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["average"], strict=False)
    save_checkpoint(folder, trainer.average, trainer.tokenizer, trainer.sentence_tokenizer, Calibration())


def fit_logistic(x: Tensor, target: Tensor) -> Logistic:
    """Least cross-entropy fit of sigmoid(slope x + offset) to targets in 0..1, by Newton-like LBFGS steps."""
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        z = parameters[0] * x.double() + parameters[1]
        loss = F.binary_cross_entropy_with_logits(z, target.double()) + 1e-4 * (parameters**2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return Logistic(*(float(v) for v in parameters.detach()))


def fit_temperature(log_scores: Sequence[Tensor], right: Sequence[int]) -> float:
    """The temperature that makes log-probabilities [N_i] of lists of any length most likely on the right label."""
    grid = np.exp(np.linspace(-1.5, 1.5, 121))
    losses = [
        sum(float(F.cross_entropy((s / t)[None], torch.tensor([r]))) for s, r in zip(log_scores, right, strict=True))
        for t in grid
    ]
    return float(grid[int(np.argmin(losses))])


def calibrate(folder: Path, data: Path, sets: Sequence[str], limit: int | None = None) -> Calibration:
    """Fit the calibration of a checkpoint on validation records and store it with the checkpoint."""
    perceiver = Perceiver.load(folder)
    records = thinned(read_records(data, sets, "val"), limit)
    fitted = dataclasses.replace(
        Calibration(), **_answers(perceiver, records), **_captions(perceiver, records), **_labels(perceiver, records)
    )
    save_calibration(folder, fitted)
    return fitted


def _ask(perceiver: Perceiver, queries: Sequence[Query]) -> list[TileAnswer]:
    chunks = (queries[i : i + BATCH] for i in range(0, len(queries), BATCH))
    return [answer for chunk in chunks for answer in perceiver.answer(chunk)]


def _answers(perceiver: Perceiver, records: Sequence[Record]) -> dict[str, Logistic]:
    """Confidences of a fresh export, whose calibration is the identity, are raw probabilities.

    Yes-or-no questions are the data's own and, so that no leaning goes unseen, as many with yes as with no made from
    the presence labels.
    """
    rng = Random("calibration")
    pairs = [
        (Query("vqa", image, text=qa.question), qa)
        for r in records
        for image in [load_image(r.images[0])]
        for qa in (*r.qa, *presence_questions(r, rng))
    ]
    said = _ask(perceiver, [query for query, _ in pairs])
    found: dict[str, list[tuple[float, bool]]] = {"yes_no": [], "comparison": [], "answer": []}
    for answer, (_, qa) in zip(said, pairs, strict=True):
        assert isinstance(answer, TileVqa)
        p = min(max(answer.confidence, 1e-6), 1 - 1e-6)
        log_odds = float(np.log(p / (1 - p)))
        truth = normalise(qa.answer)
        if answer.kind != "yes_no":
            found["answer"].append((log_odds, normalise(answer.answer) == truth))
        elif truth in ("yes", "no"):
            kind = "comparison" if read_comparison(qa.question) else "yes_no"
            found[kind].append((log_odds if answer.answer == "yes" else -log_odds, truth == "yes"))
    return {
        name: fit_logistic(torch.tensor([x for x, _ in rows]), torch.tensor([float(y) for _, y in rows]))
        for name, rows in found.items()
        if rows
    }


def _captions(perceiver: Perceiver, records: Sequence[Record]) -> dict[str, Logistic]:
    captioned = [r for r in records if r.captions]
    if not captioned:
        return {}
    said = _ask(perceiver, [Query("caption", load_image(r.images[0])) for r in captioned])
    x, y = [], []
    for answer, record in zip(said, captioned, strict=True):
        assert isinstance(answer, TileCaption)
        p = min(max(answer.confidence, 1e-9), 1 - 1e-9)
        x.append(float(np.log(p / (1 - p))))  # undoes the identity calibration: the mean token log-probability
        y.append(rouge_l([tokenize(answer.caption)], [[tokenize(c) for c in record.captions]]))
    return {"caption": fit_logistic(torch.tensor(x), torch.tensor(y))}


def _labels(perceiver: Perceiver, records: Sequence[Record]) -> dict[str, float]:
    scenes = {
        name: sorted({r.scene for r in records if r.set == name and r.scene}) for name in {r.set for r in records}
    }
    asked = [r for r in records if r.scene]
    if not asked:
        return {}
    queries = [Query("classify", load_image(r.images[0]), labels=tuple(scenes[r.set])) for r in asked]
    logs, right = [], []
    for answer, record in zip(_ask(perceiver, queries), asked, strict=True):
        assert isinstance(answer, TileClasses)
        assert record.scene is not None
        logs.append(torch.tensor(answer.scores).clamp(min=1e-12).log())
        right.append(scenes[record.set].index(record.scene))
    return {"label_temperature": fit_temperature(logs, right)}
