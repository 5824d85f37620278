"""Answers to questions: as the data ask them, reworded, and about every presence label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from model_server.evaluation.answer_metrics import (
    balanced_accuracy,
    expected_calibration_error,
    matches,
    normalise,
    rsvqa_bin,
)
from model_server.evaluation.asking import Model, ask, mean_colour
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.results import Results, Row
from model_server.perceiver import Query
from model_server.protocol import TileVqa
from model_server.text.questions import QA, askable_labels, parse, presence_question, rephrase
from model_server.training.records import Record, load_image

_GEOCHAT_TYPES = ("presence", "comparison", "rural_urban")
_SEEN_ENOUGH = 3  # training answers to the same question before its own majority is believed

Reword = Callable[[Record, QA], str]
Measures = dict[str, tuple[float, int]]  # metric -> value, questions


@dataclass(frozen=True)
class Item:
    """One question about one image. `about` is what the majority control looks up: the label or the parsed question."""

    record: Record
    qa: QA
    about: Hashable


@dataclass(frozen=True)
class Answers:
    """What was answered to the items, with and without the image, and what a majority answer would have been.

    The blind were asked in the sentences of the first protocol on the same items: without an image, other words for a
    question add nothing to say.
    """

    items: list[Item]
    ours: list[TileVqa]
    blind: list[TileVqa]
    majority: list[str] | None

    def rows(self, data: EvaluatedSet, protocol: str, measure: Callable[[list[str]], Measures]) -> Iterable[Row]:
        """A row for each measure of our answers, with the same measure of the controls."""
        ours = measure([answer.answer for answer in self.ours])
        blind = measure([answer.answer for answer in self.blind])
        majority = measure(self.majority) if self.majority is not None else None
        for metric, (value, n) in ours.items():
            controls = {"majority": majority[metric][0] if majority else None, "blind": blind[metric][0]}
            yield Row(data.name, data.split, "vqa", protocol, metric, value, n, controls)


def evaluate_answers(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the rows of one set's own questions and of its presence labels, where it has them."""
    own = [Item(record, qa, _meaning(qa)) for record in data.records for qa in record.qa]
    labels = [item for record in data.records for item in _label_items(record)]
    if not own and not labels:
        results.notes.append(f"{data.name}: neither questions nor presence labels in split {data.split!r}, no vqa row")
        return
    if not data.train:
        results.notes.append(f"{data.name}: no training records, so no majority answers")
    if own:
        _own_questions(model, data, own, results)
    if labels:
        _label_questions(model, data, labels, results)


def _own_questions(model: Model, data: EvaluatedSet, items: list[Item], results: Results) -> None:
    majority = _majority(items, [Item(r, qa, _meaning(qa)) for r in data.train for qa in r.qa])
    asked: dict[str, Reword] = {
        "exact": lambda _, qa: qa.question,
        "exact/held-out-phrasing": lambda record, qa: rephrase(qa.question, _rng(record, qa), held_out=True),
    }
    for protocol, answers in _answer(model, data, items, asked, majority).items():
        results.rows += answers.rows(data, protocol, lambda predicted: _exact(predicted, items))
        results.rows += _confidence_rows(data, protocol, answers)
        if protocol == "exact" and any(item.qa.type == "comparison" for item in items):
            results.rows += _rsvqa_rows(data, answers)


def _label_questions(model: Model, data: EvaluatedSet, items: list[Item], results: Results) -> None:
    majority = _majority(items, [item for record in data.train for item in _label_items(record)])
    asked = {
        "presence-labels": _asking_label(False, False),
        "presence-labels/held-out-phrasing": _asking_label(True, False),
        "presence-labels/held-out-names": _asking_label(False, True),
    }
    for protocol, answers in _answer(model, data, items, asked, majority).items():
        results.rows += answers.rows(data, protocol, lambda predicted: _yes_no(predicted, items))
        results.rows += _confidence_rows(data, protocol, answers)


def _asking_label(held_out: bool, unseen_names: bool) -> Reword:
    return lambda record, qa: presence_question(qa.question, _rng(record, qa), held_out, unseen_names)


def _label_items(record: Record) -> list[Item]:
    """One item for each label; its `question` is the label until it is put into words."""
    return [
        Item(record, QA(label, "yes" if record.presence[label] else "no", "presence"), label)
        for label in askable_labels(record.presence)
    ]


# --- asking ----------------------------------------------------------------------------------------------------------


def _answer(model: Model, data: EvaluatedSet, items: list[Item], protocols: Mapping[str, Reword],
            majority: list[str] | None) -> dict[str, Answers]:  # fmt: skip
    """Answers by protocol."""
    worded = {
        name: [(item.record, reword(item.record, item.qa)) for item in items] for name, reword in protocols.items()
    }
    first = next(iter(protocols))
    blind = answers_to(model, data, worded[first], f"{data.name} {first}, blind", blind=True)
    return {
        name: Answers(items, answers_to(model, data, asked, f"{data.name} {name}", blind=False), blind, majority)
        for name, asked in worded.items()
    }


def answers_to(model: Model, data: EvaluatedSet, asked: Sequence[tuple[Record, str]], title: str, blind: bool
               ) -> list[TileVqa]:  # fmt: skip
    """Answers to questions about records, those about one record in a row. What was asked before is not asked again."""
    keys = [(record.id, question, blind) for record, question in asked]
    new = {k: pair for k, pair in zip(keys, asked, strict=True) if k not in data.answered}
    found = ask(model, _queries(list(new.values()), blind), len(new), TileVqa, title)
    data.answered.update(zip(new, found, strict=True))
    return [data.answered[key] for key in keys]


def _queries(asked: Sequence[tuple[Record, str]], blind: bool) -> Iterable[Query]:
    """Questions image by image; those about one image share one array, so that it need not be encoded again."""
    seen, image = None, np.zeros(0)
    for record, question in asked:
        if record is not seen:
            seen, image = record, load_image(record.images[0])
            image = mean_colour(image) if blind else image
        yield Query("vqa", image, text=question)


def _rng(record: Record, qa: QA) -> Random:
    """The same wording in every run, another one for every question."""
    return Random(f"{record.id} {qa.question}")


# --- controls --------------------------------------------------------------------------------------------------------


def _meaning(qa: QA) -> Hashable:
    return parse(qa.question) or normalise(qa.question)


def _majority(items: Sequence[Item], train: Sequence[Item]) -> list[str] | None:
    """The commonest training answer to the same question, or to its type where that was asked too seldom."""
    if not train:
        return None
    by_question: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
    by_type: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in train:
        by_question[item.about][normalise(item.qa.answer)] += 1
        by_type[item.qa.type][normalise(item.qa.answer)] += 1
    guesses = []
    for item in items:
        counts = by_question.get(item.about, Counter())
        counts = counts if counts.total() >= _SEEN_ENOUGH else by_type[item.qa.type]
        guesses.append(max(sorted(counts), key=lambda answer: counts[answer]) if counts else "")
    return guesses


# --- measures --------------------------------------------------------------------------------------------------------


def _by_type(correct: np.ndarray, types: Sequence[str]) -> Measures:
    measures: Measures = {"accuracy": (float(correct.mean()), len(correct))}
    shares = []
    for name in sorted(set(types)):
        of_type = correct[np.array(types) == name]
        shares.append(float(of_type.mean()))
        measures[f"accuracy/{name}"] = (shares[-1], len(of_type))
    return measures | {"mean_accuracy": (float(np.mean(shares)), len(correct))}


def _exact(predicted: list[str], items: Sequence[Item]) -> Measures:
    correct = matches(predicted, [item.qa.answer for item in items])
    measures = _by_type(correct, [item.qa.type for item in items])
    presence = [i for i, item in enumerate(items) if item.qa.type == "presence"]
    if presence:
        value = balanced_accuracy(correct[presence], [items[i].qa.answer for i in presence])
        measures["balanced_accuracy/presence"] = (value, len(presence))
    return measures


def _yes_no(predicted: list[str], items: Sequence[Item]) -> Measures:
    truth = [item.qa.answer for item in items]
    correct = matches(predicted, truth)
    n = len(items)
    return {"accuracy": (float(correct.mean()), n), "balanced_accuracy": (balanced_accuracy(correct, truth), n)}


def _rsvqa_rows(data: EvaluatedSet, answers: Answers) -> Iterable[Row]:
    items = answers.items
    types = [item.qa.type for item in items]
    some = [i for i, name in enumerate(types) if name in _GEOCHAT_TYPES]

    def geochat(predicted: list[str]) -> Measures:
        correct = matches([predicted[i] for i in some], [items[i].qa.answer for i in some])
        return _by_type(correct, [types[i] for i in some])

    # Counts are binned on LR only; HR, which is the set that asks for areas, counts few things and scores them exactly.
    binned = {"area"} if "area" in types else {"count"}

    def full(predicted: list[str]) -> Measures:
        pairs = zip(predicted, items, strict=True)
        correct = np.array(
            [
                rsvqa_bin(answer, item.qa.type) == rsvqa_bin(item.qa.answer, item.qa.type)
                if item.qa.type in binned
                else normalise(answer) == normalise(item.qa.answer)
                for answer, item in pairs
            ]
        )
        return _by_type(correct, types)

    yield from answers.rows(data, "rsvqa-geochat", geochat)
    yield from answers.rows(data, "rsvqa-full", full)


def _confidence_rows(data: EvaluatedSet, protocol: str, answers: Answers) -> Iterable[Row]:
    """How far the confidence can be trusted: `ece`, the share answered at all, and the accuracy of those answers."""
    correct = matches([a.answer for a in answers.ours], [item.qa.answer for item in answers.items])
    given = np.array([not answer.abstained for answer in answers.ours])
    n = len(correct)

    def row(metric: str, value: float, n: int) -> Row:
        return Row(data.name, data.split, "vqa", protocol, metric, value, n)

    yield row("ece", expected_calibration_error([answer.confidence for answer in answers.ours], correct), n)
    yield row("coverage", float(given.mean()), n)
    if given.any():
        yield row("selective_accuracy", float(correct[given].mean()), int(given.sum()))
