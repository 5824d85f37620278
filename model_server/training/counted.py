"""Further questions whose answers follow from those that an image already has.

RSVQA computes every answer from counts of map objects (Lobry et al. 2020), so an image's own counts and noes say
which of any two things is more: dozens of true comparisons for each one that was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from random import Random

from model_server.text.phrasings import Kind
from model_server.text.questions import QA, Noun, Question, ask, parse

TIES = 0.15  # share of equal pairs that "more" and "less" are asked of: hardly any in the data


def known_counts(qa: Sequence[QA]) -> dict[tuple[str, str], int]:
    """How many there are of each (head, tail) that an image's questions settle: counts asked for, and noes."""
    counts: dict[tuple[str, str], int] = {}
    for one in qa:
        meaning = parse(one.question)
        if meaning is None or meaning.subject is None:
            continue
        thing = (meaning.subject.head, meaning.subject.tail)
        if one.type == "count" and one.answer.isdecimal():
            counts[thing] = int(one.answer)
        elif one.type == "presence" and one.answer == "no":
            counts.setdefault(thing, 0)
    return counts


def compared(qa: Sequence[QA], rng: Random, most: int) -> list[QA]:
    """Up to `most` comparisons and half as many presences that follow from an image's counts, in training words.

    Empty where the image counts nothing, or one thing alone.
    """
    counts = known_counts(qa)
    pairs = list(permutations(sorted(counts), 2))
    out = []
    for a, b in rng.sample(pairs, min(most, len(pairs))):
        more, equal = counts[a] > counts[b], counts[a] == counts[b]
        kinds: list[tuple[Kind, bool]] = [("more", more), ("less", not more and not equal), ("equal", equal)]
        kind, holds = rng.choice(kinds)
        if equal and kind != "equal" and rng.random() > TIES:
            continue
        out.append(QA(ask(Question(kind, _noun(a), _noun(b)), rng), _yes(holds), "comparison"))
    for thing in rng.choices(sorted(counts), k=most // 2) if pairs else ():
        out.append(QA(ask(Question("presence", _noun(thing)), rng), _yes(counts[thing] > 0), "presence"))
    return out


def _noun(thing: tuple[str, str]) -> Noun:
    return Noun(*thing)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
