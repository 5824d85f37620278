"""From raw model scores to confidences that mean something: fitted on validation data, stored with the weights.

Yes or no: Platt scaling of the odds of yes against no, which also mends a leaning towards either; comparisons apart,
whose odds come from two numbers. Other answers: Platt scaling of the answer's log-odds. Labels: one temperature.
Captions: a logistic map from the mean token log-probability to the ROUGE-L that such captions reach against their
references, so a caption's confidence is its expected agreement with a human's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logistic:
    """x -> 1 / (1 + exp(-(slope x + offset)))."""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, x: float) -> float:
        z = max(-30.0, min(30.0, self.slope * x + self.offset))
        return 1 / (1 + math.exp(-z))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`abstain_below` are the confidences under which an answer is withheld as an abstention."""

    yes_no: Logistic = Logistic()
    comparison: Logistic = Logistic()
    answer: Logistic = Logistic()
    caption: Logistic = Logistic()
    label_temperature: float = 1.0
    abstain_yes_no: float = 0.6
    abstain_answer: float = 0.3

    def answer_confidence(self, logprob: float) -> float:
        """Chance that an answer of this log-probability, neither yes nor no, is right."""
        p = min(max(math.exp(logprob), 1e-6), 1 - 1e-6)
        return self.answer(math.log(p / (1 - p)))

    def abstain_below(self, yes_no: bool) -> float:
        return self.abstain_yes_no if yes_no else self.abstain_answer

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        raw: dict[str, Any] = json.loads(text)
        values: dict[str, Any] = {k: Logistic(**v) if isinstance(v, dict) else v for k, v in raw.items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DenseCalibration:
    """Of the dense branch, in a file of its own: the thresholds of high F1 on validation data.

    `detect`: scores of boxes; `mask` and `change`: probabilities of pixels. Keys are phrases' concepts (`ship`), for
    boxes on radar under the names of `working_scale.kinds`, or, for change, what `change_kind` calls the imagery;
    `default` stands for all others. `box_confidence`, by concept, turns the log-odds of a box's score into the chance
    that such a box is right (IoU 0.5).
    """

    detect: dict[str, float] = field(default_factory=lambda: {"default": 0.35})
    mask: dict[str, float] = field(default_factory=lambda: {"default": 0.5})
    change: dict[str, float] = field(default_factory=lambda: {"default": 0.5})
    box_confidence: dict[str, Logistic] = field(default_factory=lambda: {"default": Logistic()})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> DenseCalibration:
        raw: dict[str, Any] = json.loads(text)
        return cls(**{**raw, "box_confidence": {k: Logistic(**v) for k, v in raw["box_confidence"].items()}})
