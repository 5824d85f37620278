"""Questions that boxes and masks answer better than words: how many of one thing there are, how much ground it covers.

Whatever unit of area a question names, the answer is in square metres and says so.

Only plain questions about one thing are read so; with a place, a comparison or a second thing in it, a question stays
one for the text model. So does the number of what has no clear bounds, and the area of what is seen as a box only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Amount:
    """What is asked for: the number of `phrase`, or the square metres that it covers."""

    kind: Literal["count", "area"]
    phrase: str


_THING = r"(?:the |all |different )?(?P<thing>[a-z][a-z\- ]*?)"
_SEEN = (
    r"(?: (?:are|is) (?:there|visible|present|shown|seen)| (?:there are|do you see|do you count)"
    r"| can (?:be seen|be counted|you see|you count|you find)| are| is)?"
)
_HERE = r"(?: (?:in|on|within|here in) (?:the|this) (?:image|picture|scene|photo|photograph|view|tile|region|area))?"
_END = _SEEN + _HERE + r"(?: in total| altogether| here)?"
_COUNTS = (
    rf"how many {_THING}{_END}",
    rf"what is the (?:total )?(?:number|count|amount) of {_THING}{_END}",
    rf"(?:please )?count {_THING}{_END}",
)
_COVERED = r"(?:covered|occupied|taken up)"
_UNIT = r"(?:square (?:kilo)?met(?:er|re)s?|square miles?|hectares?|acres?|ha|k?m2)"
_IN_UNITS = rf"{_HERE}(?:,? in {_UNIT})?"
_AREAS = (
    rf"(?:what|how large an|how much) (?:area|ground|land|surface|space) is {_COVERED} by {_THING}{_IN_UNITS}",
    rf"(?:what area|how large an area|how much (?:area|ground|land|surface|space)) is {_THING}{_IN_UNITS}",
    rf"what is the (?:total )?area (?:{_COVERED} by|of) {_THING}{_IN_UNITS}",
    rf"(?:what|how much) (?:area|ground|land|surface|space) (?:do|does) {_THING} (?:cover|occupy|take up){_IN_UNITS}",
    rf"how many {_UNIT} (?:are {_COVERED} by|of|do|does) {_THING}(?: cover| occupy| are there)?{_HERE}",
)
_PATTERNS = [(kind, re.compile(text)) for kind, texts in (("area", _AREAS), ("count", _COUNTS)) for text in texts]
# What the model learned boxes of, and what it learned masks of: of a ship it has seen no outline, of a lake no box.
_THINGS = frozenset(
    "ship boat vessel watercraft ferry yacht barge tanker freighter car automobile vehicle van bus buse truck lorry "
    "lorrie airplane plane aircraft jet airliner aeroplane building house home dwelling warehouse tree".split()
)
_GROUNDS = frozenset(
    "water floodwater flood river lake sea road street highway motorway roadway avenue forest woodland wood slick "
    "spill".split()
)
_WITHIN = frozenset(
    "and or at on in of next near by to with without than that which who is are not more less fewer most left right "
    "top bottom above below between around beside it they them these those".split()
)
_MOST_WORDS = 4


def asked_amount(question: str) -> Amount | None:
    """What a question asks the amount of; None where it is no plain question for one, or for what is not learned so."""
    text = re.sub(r"\s+", " ", question).strip().rstrip("?.! ").lower()
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        words = match["thing"].split() if match else []
        learned = _GROUNDS if kind == "area" else _THINGS
        if words and len(words) <= _MOST_WORDS and not _WITHIN.intersection(words) and _one(words[-1]) in learned:
            return Amount("area" if kind == "area" else "count", " ".join(words))
    return None


def _one(word: str) -> str:
    return word.removesuffix("s")
