"""Short answers: the form in which they are compared, and what kind of thing they are."""

from __future__ import annotations

import re

from model_server.protocol import AnswerKind

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBERS = {word: value for value, word in enumerate(_UNITS)}
for _i, _ten in enumerate(_TENS, start=2):
    _NUMBERS[_ten] = 10 * _i
    _NUMBERS |= {f"{_ten} {_UNITS[unit]}": 10 * _i + unit for unit in range(1, 10)}


def normalise(answer: str) -> str:
    """The form in which answers are compared.

    Lower case, punctuation and spare white space dropped, no space before a unit ("431 m2" is "431m2"), a number in
    words up to ninety-nine as digits ("twenty-two" is "22").
    """
    text = " ".join(re.sub(r"[^\w\s.]|\.(?!\d)|_", " ", answer.lower().replace("m²", "m2")).split())
    text = re.sub(r"(\d) (m2)\b", r"\1\2", text)
    return str(_NUMBERS[text]) if text in _NUMBERS else text


def answer_kind(answer: str) -> AnswerKind:
    """What kind of thing an answer is, read off the answer."""
    if answer in ("yes", "no"):
        return "yes_no"
    if normalise(answer).isdigit():
        return "count"
    if re.fullmatch(r"[\d.]+ ?m2", answer):
        return "area"
    return "category" if len(answer.split()) <= 3 else "text"
