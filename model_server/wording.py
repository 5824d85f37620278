"""What was written becomes an answer: the best of several hypotheses, its kind, and a confidence that means something.

Hypotheses are texts with the log-probability of all of each, best first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from model_server.calibration import Calibration
from model_server.protocol import RankedAnswer, TileVqa
from model_server.text.answers import answer_kind
from model_server.text.comparison import Kind, odds

Said = Sequence[tuple[str, float]]


def sentence(text: str) -> str:
    """Capital and full stop."""
    text = re.sub(r"\s+", " ", text).strip()
    return text[:1].upper() + text[1:] + "." if text else text


def vqa_answer(hypotheses: Said, calibration: Calibration) -> TileVqa:
    """The likeliest answer to a question, and up to three others."""
    said = list(dict(reversed(hypotheses)).items())[::-1]  # each text once, as probable as its best hypothesis
    answer, logprob = said[0]
    kind = answer_kind(answer)
    if kind == "yes_no":
        return yes_or_no(dict(said), calibration)
    confidence = calibration.answer_confidence(logprob)
    rest = sum(math.exp(p) for _, p in said[1:])
    return TileVqa(
        answer=answer,
        kind=kind,
        confidence=confidence,
        abstained=confidence < calibration.abstain_below(yes_no=False),
        alternatives=[
            RankedAnswer(answer=a, confidence=(1 - confidence) * math.exp(p) / max(rest, 1e-9)) for a, p in said[1:4]
        ],
    )


def yes_or_no(said: Mapping[str, float], calibration: Calibration) -> TileVqa:
    """The calibrated odds of yes against no, whatever else might have been said."""
    least = min(said.values())  # of an answer that is not among the best, no more is known than that it is rarer
    return _yes_no(calibration.yes_no(said.get("yes", least) - said.get("no", least)), calibration)


def comparison_answer(kind: Kind, first: Said, second: Said, calibration: Calibration) -> TileVqa:
    """What follows from the numbers that were said of two things. Even odds, so an abstention, where the model gave no
    number for one of the two."""
    a, b = _numbers(first), _numbers(second)
    return _yes_no(calibration.comparison(odds(kind, a, b)) if a and b else 0.5, calibration)


def _numbers(hypotheses: Said) -> dict[int, float]:
    """How probable each number is among what was said; empty where no number was."""
    numbers = [(int(text), math.exp(logprob)) for text, logprob in hypotheses if text.isdecimal()]
    return {n: sum(p for m, p in numbers if m == n) / sum(p for _, p in numbers) for n, _ in numbers}


def _yes_no(yes: float, calibration: Calibration) -> TileVqa:
    """The answer at this calibrated probability of yes."""
    answer, other = ("yes", "no") if yes >= 0.5 else ("no", "yes")
    confidence = max(yes, 1 - yes)
    return TileVqa(
        answer=answer,
        kind="yes_no",
        confidence=confidence,
        abstained=confidence < calibration.abstain_below(yes_no=True),
        alternatives=[RankedAnswer(answer=other, confidence=1 - confidence)],
    )
