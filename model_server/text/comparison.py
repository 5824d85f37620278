"""Questions that compare two numbers, "are there more cars than trees?", read as two questions that count.

A model that can say how many there are of each thing need not learn every comparison of two. Knows English wordings
with more, less, fewer, as many, the same or equal number; whatever else a question asks is left to the model's words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model_server.text.questions import is_mass

_A, _B = r"(?:the )?(?P<a>[a-z][a-z -]*?)", r"(?:of |the |there are )*(?P<b>[a-z][a-z -]*?)"
_COUNT = r"(?:number|amount|count|quantity)"
_THE_COUNT = rf"(?:the {_COUNT} of |that of )?"
_HERE = (
    r"(?: (?:here|in view|on the ground|(?:be )?(?:seen|visible|present)"
    r"|(?:in|on|within|of) (?:the|this) (?:[a-z]+ ){0,2}"
    r"(?:image|picture|photo|photograph|scene|area|frame|tile|view)))*"
)
_MORE = r"(?:greater|larger|higher|bigger|above|more)"
_LESS = r"(?:smaller|lower|fewer|less|below)"
Kind = Literal["more", "less", "equal"]
_WORDED: tuple[tuple[Kind, str], ...] = (
    ("more", rf"comparing {_A} and {_B}, (?:are|is) there more (?P=a)"),
    ("less", rf"comparing {_A} and {_B}, (?:are|is) there (?:less|fewer) (?P=a)"),
    ("equal", rf".*\b(?:as many|equally many) {_A} (?:as|and) {_B}"),
    ("equal", rf".*\b{_COUNT} of {_A} (?:equal to|the same as|match|matches) (?:the {_COUNT} of|that of) {_B}"),
    ("equal", rf".*\b(?:same|equal) {_COUNT} of {_A} (?:and|as) {_B}"),
    ("equal", rf"(?:are|do|is) {_A} and {_B} (?:occur in|come in|equal in|in|of) (?:an |the )?(?:equal |same )?number"),
    ("more", rf".*\b{_COUNT} of {_A} (?:exceed|exceeds|{_MORE} than|above) {_THE_COUNT}{_B}"),
    ("less", rf".*\b{_COUNT} of {_A} (?:{_LESS} than|below) {_THE_COUNT}{_B}"),
    ("more", rf".*\b{_MORE} {_COUNT} of {_A} than {_B}"),
    ("less", rf".*\b{_LESS} {_COUNT} of {_A} than {_B}"),
    ("more", rf"(?:do|does) {_A} outnumber {_B}"),
    ("less", rf"(?:are|is) {_A} outnumbered by {_B}"),
    ("more", rf"(?:are|is) {_A} more numerous than {_B}"),
    ("less", rf"(?:are|is) {_A} (?:less|fewer) numerous than {_B}"),
    ("more", rf".*\bmore {_A} than {_B}"),
    ("less", rf".*\b(?:less|fewer) {_A} than {_B}"),
)  # fmt: skip
_PATTERNS: list[tuple[Kind, re.Pattern[str]]] = [(kind, re.compile(text + _HERE)) for kind, text in _WORDED]
_LONGEST = 10  # words of one thing, with its place: "residential buildings on the left of a water area"
_OTHERWISE = re.compile(r"(?:how|what|is it) .*")  # asks for a number, or of the whole place
_PLACE = re.compile(r"(?:in|on|at|to|by|near) .*")  # "more ships in the harbor than in the sea": one thing, two places


@dataclass(frozen=True)
class Comparison:
    """Whether there are more, fewer or as many of thing `a` as of thing `b`."""

    kind: Kind
    a: str
    b: str

    def questions(self) -> tuple[str, str]:
        """One question after each number, in the words of RSVQA."""
        return f"What is the number of {self.a}?", f"What is the number of {self.b}?"


def read_comparison(question: str) -> Comparison | None:
    """The comparison that a question makes of two numbers, or None."""
    text = re.sub(r"\s+", " ", question).strip().rstrip("?.! ").lower()
    if _OTHERWISE.fullmatch(text):
        return None
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match and all(_countable(match[name]) for name in "ab"):
            return Comparison(kind, match["a"].strip(), match["b"].strip())
    return None


def _countable(thing: str) -> bool:
    """A noun with a number: not "water", not "in the sea"."""
    return len(thing.split()) <= _LONGEST and not is_mass(thing) and not _PLACE.fullmatch(thing)


def odds(kind: Kind, a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Log-odds of yes from how probable each number of `a` and of `b` is (each summing to 1), taken as independent."""
    holds = {"more": int.__gt__, "less": int.__lt__, "equal": int.__eq__}[kind]
    yes = sum(p * q for i, p in a.items() for j, q in b.items() if holds(i, j))
    yes = min(max(yes, 1e-4), 1 - 1e-4)
    return math.log(yes / (1 - yes))
