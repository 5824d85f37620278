"""How the answers of many looks at a region become one.

Pure functions. What the question asks for decides, not what the answers happen to be:

| asked for | looked at | the one answer |
| --- | --- | --- |
| presence | overview and overlapping tiles | yes if any look says so, by the surest; else no, by the least sure |
| count | a partition into tiles | the sum |
| area | a partition into tiles | the sum |
| comparison, position | the overview alone | its answer |
| anything else | overview and parts | the majority, weighted by confidence |

In a majority the overview weighs as much as all parts together: it sees what belongs together, they see it sharply.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from model_server.change_words import place_in
from model_server.protocol import AnswerKind, TileCaption, TileClasses, TileVqa
from rs_tools.imagery.scene import Region

Scope = Literal["presence", "count", "area", "once", "whole"]

MAX_EVIDENCE = 20
MAX_ALTERNATIVES = 3
MENTIONED = {"short": 2, "full": 4}  # parts that a caption speaks of
_A = TypeVar("_A")


@dataclass(frozen=True)
class Look(Generic[_A]):
    """One tile's answer.

    Attributes:
        region: what was looked at, in scene pixels.
        answer: as the model gave it.
        share: valid pixels of the look as a share of all valid pixels of the parts; 1 for an overview.
        overview: the look is at the whole.
    """

    region: Region
    answer: _A
    share: float = 1.0
    overview: bool = False


@dataclass(frozen=True)
class Answered:
    """One answer to a question, with the looks it rests on, the most telling first."""

    answer: str
    kind: AnswerKind
    confidence: float
    abstained: bool
    alternatives: list[tuple[str, float]]
    evidence: list[Look[TileVqa]]
    warnings: list[str] = field(default_factory=list)


# --- what a question asks for -----------------------------------------------------------------------------------------

_OPEN = re.compile(
    r"^(please )?(what|which|who|why|when|how|name|classify|describe|explain|give|list|say|summari[sz]e)\b"
    r"|\bwhat (kind|type|sort|category|scene|place)\b"
)
_CHOOSES = re.compile(r"\b(rural|urban)\b")
_PLACES = re.compile(
    r"^(where|whereabouts)\b|\bwhere (the|is|are|can|do|does)\b|\b(location|position) of\b|\bwhat position\b"
    r"|\b(which|what) (side|part|corner|half)\b"
    r"|\b(top|bottom|left|right|upper|lower|cent(er|re)|middle|corner|half|side) (\w+ )?(of|in) (the|this) "
    r"(\w+ )?(image|picture|scene|photo|photograph|frame|view|tile|region)\b"
    r"|\b(top|bottom|upper|lower)[ -](left|right)\b"
)
_COMPARES = re.compile(
    r"\b(more|less|fewer|as many|equally|equal|outnumber|outnumbered|exceeds?)\b|\bsame (number|amount)\b"
    r"|\b(number|amount|count) of\b.*\b(match|same|above|below)\b"
    r"|\b(greater|larger|higher|smaller|lower)\b.*\b(than|number|amount)\b"
)
_AREAS = re.compile(
    r"\bsquare (met(re|er)s?|kilomet(re|er)s?|miles?)\b|\b(hectares?|acres?|ha|k?m2)\b"
    r"|\bhow much (area|ground|land|space|surface)\b"
    r"|\b(area|surface|extent|space)\b.*\b(cover(ed)?|occup(y|ied)|take|have)\b|\b(area|extent|surface) of\b"
)
_COUNTS = re.compile(r"\bhow many\b|\bcount\b|\b(number|amount|quantity) of\b")
_VERB_FIRST = re.compile(r"^(is|are|do|does|can|could|has|have|would|will)\b")


def question_scope(question: str) -> Scope:
    """What a question asks for; `once`: what only a look at everything can tell (comparison, position).

    A question that opens with no question word, such as "Are there ships?" or "Ships here?", asks for presence.
    """
    text = re.sub(r"\s+", " ", question).strip().rstrip("?. ").lower()
    if _CHOOSES.search(text):
        return "whole"
    if _PLACES.search(text) or _COMPARES.search(text):
        return "once"
    if _AREAS.search(text) and not _VERB_FIRST.match(text):
        return "area"
    if _COUNTS.search(text):
        return "count"
    return "whole" if _OPEN.search(text) else "presence"


# --- questions --------------------------------------------------------------------------------------------------------


def reduce_answers(scope: Scope, looks: Sequence[Look[TileVqa]]) -> Answered:
    """One answer of the looks' answers. A single look's answer stays as it is.

    Where the looks do not answer in the form that the question calls for (a count in words), the majority decides.
    """
    if len(looks) == 1:
        return _single(looks[0])
    if scope == "presence":
        said = [look for look in looks if look.answer.kind == "yes_no"]
        return _any(said, len(looks)) if said else _majority(looks)
    if scope in ("count", "area"):
        counted = [look for look in looks if not look.overview and look.answer.kind == scope]
        return _sum(scope, counted, len(looks)) if counted else _majority(looks)
    return _majority(looks)


def _single(look: Look[TileVqa]) -> Answered:
    answer = look.answer
    others = [(other.answer, other.confidence) for other in answer.alternatives]
    return Answered(answer.answer, answer.kind, answer.confidence, answer.abstained, others, [look])


def _any(said: Sequence[Look[TileVqa]], asked: int) -> Answered:
    """One yes suffices, and the surest look vouches for it; no needs every look, so the least sure one limits it."""
    warnings = _left_out(asked - len(said), asked, "with yes or no")
    yes = sorted((look for look in said if look.answer.answer == "yes"), key=_confidence, reverse=True)
    if yes:
        best = yes[0].answer
        return Answered(
            "yes", "yes_no", best.confidence, best.abstained, [("no", 1 - best.confidence)], _shown(yes), warnings
        )
    doubtful = sorted(said, key=_confidence)
    least = doubtful[0].answer
    return Answered(
        "no", "yes_no", least.confidence, least.abstained, [("yes", 1 - least.confidence)], _shown(doubtful), warnings
    )


def _sum(scope: Literal["count", "area"], counted: Sequence[Look[TileVqa]], asked: int) -> Answered:
    """The sum over tiles that do not overlap, as sure as the tiles that it comes from are on average."""
    amounts = [_amount(look.answer.answer) for look in counted]
    total = sum(amounts)
    weights = amounts if total else [1.0] * len(counted)
    norm = sum(weights)
    confidence = sum(w * look.answer.confidence for w, look in zip(weights, counted, strict=True)) / norm
    unsure = sum(w for w, look in zip(weights, counted, strict=True) if look.answer.abstained) / norm
    order = sorted(range(len(counted)), key=lambda i: -amounts[i])
    what = "counts" if scope == "count" else "areas"
    warnings = [
        f"The answer is the sum of the model's {what} in {len(counted)} tiles. It estimates {what} poorly, and errors "
        "add up" + ("; an object cut by a tile's edge may count twice." if scope == "count" else ".")
    ]
    warnings += _left_out(asked - len(counted), asked, "with a number")
    shown = [counted[i] for i in order if amounts[i] or not total]
    answer = f"{total:.0f}" if scope == "count" else f"{total:g}m2"
    return Answered(answer, scope, confidence, unsure > 0.5, [], _shown(shown), warnings)


def _majority(looks: Sequence[Look[TileVqa]]) -> Answered:
    votes: dict[str, list[Look[TileVqa]]] = defaultdict(list)
    for look in looks:
        votes[look.answer.answer].append(look)
    # An answer's confidence is its vote: of a look drawn by weight, the chance that it says so and is right.
    total = sum(look.share for look in looks)
    shares = {answer: sum(map(_vote, those)) / total for answer, those in votes.items()}
    best, *others = sorted(votes, key=lambda answer: -shares[answer])
    winning = sorted(votes[best], key=_vote, reverse=True)
    unsure = sum(_vote(look) for look in winning if look.answer.abstained)
    return Answered(
        best,
        winning[0].answer.kind,
        min(1.0, shares[best]),
        unsure > 0.5 * sum(map(_vote, winning)),
        [(other, min(1.0, shares[other])) for other in others[:MAX_ALTERNATIVES]],
        _shown(winning),
    )


def _confidence(look: Look[TileVqa]) -> float:
    return look.answer.confidence


def _vote(look: Look[TileVqa]) -> float:
    return look.share * look.answer.confidence


def _amount(answer: str) -> float:
    return float(re.sub(r"[^\d.]", "", answer.removesuffix("m2")))


def _shown(looks: Sequence[Look[TileVqa]]) -> list[Look[TileVqa]]:
    return list(looks[:MAX_EVIDENCE])


def _left_out(missing: int, asked: int, how: str) -> list[str]:
    return [f"{missing} of {asked} looks did not answer {how} and were left out."] if missing else []


# --- classes ----------------------------------------------------------------------------------------------------------


def reduce_classes(looks: Sequence[Look[TileClasses]]) -> dict[str, float]:
    """Label -> probability: the mean of the looks' probabilities, each weighted by its share and its surest class.

    A single look's stay as they are. A look at nothing in particular (a plain field among houses) is not sure of any
    class, so it hardly counts.
    """
    if len(looks) == 1:
        return dict(zip(looks[0].answer.labels, looks[0].answer.scores, strict=True))
    sums: dict[str, float] = defaultdict(float)
    total = 0.0
    for look in looks:
        weight = look.share * max(look.answer.scores)
        total += weight
        for label, score in zip(look.answer.labels, look.answer.scores, strict=True):
            sums[label] += weight * score
    return {label: value / total for label, value in sums.items()}


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """One caption; `parts` are the looks at parts of the region in reading order, empty where one look sufficed."""

    caption: str
    confidence: float
    parts: list[Look[TileCaption]]


def reduce_captions(looks: Sequence[Look[TileCaption]], detail: Literal["short", "full"]) -> Described:
    """The overview's caption, and after it what parts show that has not been said, with their place.

    Parts are taken in the order of what their first sentence adds: content words not said so far, times confidence. A
    part of whose words half have been said is not mentioned. The confidence is the mean over the captions used.
    """
    if len(looks) == 1:
        return Described(looks[0].answer.caption, looks[0].answer.confidence, [])
    parts = [look for look in looks if not look.overview]
    whole = _bounds(parts)
    first = next((look for look in looks if look.overview), None) or max(parts, key=lambda look: look.answer.confidence)
    used, said = [first], _words(first.answer.caption)
    sentences = [first.answer.caption]
    while len(used) <= MENTIONED[detail]:
        best = max(parts, key=lambda look: _added(look, said))
        if _added(best, said) == 0:
            break
        alike = [part for part in parts if part.answer.caption == best.answer.caption]
        places = list(dict.fromkeys(place_in(part.region, whole) for part in alike))
        where = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
        where = f"In the {where}" if len(places) <= 3 else "In many parts"
        sentences.append(f"{where}: {_first_sentence(best.answer.caption)}")
        used.append(best)
        said |= _words(_first_sentence(best.answer.caption))
    return Described(" ".join(sentences), sum(look.answer.confidence for look in used) / len(used), parts)


_FILLER = frozenset(
    "a an and are as at be by can few for from has have in into is it its lot many near of on one or other over "
    "piece seen several side sides some that the their there these this to two under which with".split()
)


def _words(caption: str) -> set[str]:
    """Content words, plurals cut so that "trees" and "tree" are one."""
    return {word.removesuffix("s") for word in re.findall(r"[a-z]+", caption.lower()) if word not in _FILLER}


def _added(look: Look[TileCaption], said: set[str]) -> float:
    words = _words(_first_sentence(look.answer.caption))
    new = words - said
    return len(new) * look.answer.confidence if 2 * len(new) > len(words) else 0.0


def _first_sentence(caption: str) -> str:
    """The first sentence, to go on after a colon."""
    sentence = re.match(r".*?[.!?](?=\s|$)|.+", caption, re.DOTALL)
    text = sentence[0] if sentence else caption
    return text[:1].lower() + text[1:]


def _bounds(parts: Sequence[Look[TileCaption]]) -> Region:
    x1, y1, x2, y2 = zip(*(part.region for part in parts), strict=True)
    return min(x1), min(y1), max(x2), max(y2)
