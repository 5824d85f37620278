"""Questions about an image: read template questions into a typed form, say them in other words, make new ones.

Parsing knows the templates of RSVQA (Lobry et al., 2020) and of RSIVQA on UCM (Zheng et al., 2021). Whatever it does
not know stays as it is. No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from model_server.text.phrasings import HELD_OUT, HELD_OUT_PLACES, IMPLIED_BY, NAMES, PLACES, TRAIN, Kind

if TYPE_CHECKING:
    from model_server.training.records import Record


@dataclass(frozen=True)
class QA:
    """A question, its answer, and the type that results are told apart by."""

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Noun:
    """What a question is about: `head` in the singular ("small road"), `tail` its place ("next to a building").

    `many` says whether the question spoke of it in the plural.
    """

    head: str
    tail: str = ""
    many: bool = True


@dataclass(frozen=True)
class Question:
    """A question by its meaning. `other` is the second term of a comparison."""

    kind: Kind
    subject: Noun | None = None
    other: Noun | None = None


# --- words -----------------------------------------------------------------------------------------------------------

_MASS = frozenset(
    {"sand", "grass", "water", "pavement", "chaparral", "shrubland", "scrubland", "soil", "earth", "asphalt", "sea"}
    | {"ocean", "turf", "vegetation", "snow", "ice", "bare ground", "sandy ground"}
)
_IRREGULAR = {"aircraft": "aircraft", "bus": "buses"}
_SINGULAR = {many: one for one, many in _IRREGULAR.items()}


def plural(noun: str) -> str:
    """The plural of a noun phrase: "place of worship" -> "places of worship", "cemetery" -> "cemeteries"."""
    first, of, rest = noun.partition(" of ")
    before, space, word = first.rpartition(" ")
    if is_mass(noun):
        return noun
    if word in _IRREGULAR:
        many = _IRREGULAR[word]
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = word + "es"
    else:
        many = word + "s"
    return before + space + many + of + rest


def singular(noun: str) -> str:
    """The singular of a noun phrase, also of the mechanical plurals of RSVQA ("pitchs", "place of worships")."""
    first, of, rest = noun.partition(" of ")
    return (_singular_word(first) + of + _singular_word(rest)) if of else _singular_word(noun)


def is_mass(noun: str) -> bool:
    """Whether the noun has no plural, as "bare soil" has none."""
    return noun in _MASS or noun.split(" of ")[0].rsplit(" ", 1)[-1] in _MASS


def with_article(noun: str) -> str:
    """The noun with its article, "an airplane"; a mass noun has none."""
    if is_mass(noun):
        return noun
    vowel = noun[:1] in "aeiou" and not noun.startswith(("uni", "use", "uti"))
    return ("an " if vowel else "a ") + noun


def _singular_word(words: str) -> str:
    before, space, word = words.rpartition(" ")
    if word in _SINGULAR:
        one = _SINGULAR[word]
    elif word.endswith("ies"):
        one = word[:-3] + "y"
    elif re.search(r"(ch|sh|x|ss)es$", word):
        one = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us")):
        one = word[:-1]
    else:
        one = word
    return before + space + one


# --- reading ---------------------------------------------------------------------------------------------------------

_PICTURE = r"(?: in (?:the|this) (?:image|picture|photo|scene))?"
_RELATION = r"(?:at the (?:top|bottom) of|on the (?:left|right) of|next to)"
_TEMPLATES: tuple[tuple[Kind, str], ...] = (
    ("rural_urban", r"is (?:it|this) an? (?:rural or an? urban|urban or an? rural) area"),
    ("theme", r"what is the theme of this picture"),
    ("location", r"what is the location of the (?P<subject>.+?)"),
    ("equal", r"is the number of (?P<subject>.+?) equal to the number of (?P<other>.+?)"),
    ("more", r"are there more (?P<subject>.+?) than (?P<other>.+?)"),
    ("less", r"are there (?:less|fewer) (?P<subject>.+?) than (?P<other>.+?)"),
    ("area", r"what is the area covered by (?P<subject>.+?)"),
    ("count", r"how many (?P<subject>.+?) are there"),
    ("count", r"how many (?P<subject>.+?)"),
    ("count", r"what is the (?:number|amount) of (?P<subject>.+?)"),
    ("presence", r"does this picture contain (?:an? )?(?P<subject>.+?)"),
    ("presence", r"is (?:there )?an? (?P<subject>.+?)(?: present)?"),
)
_PATTERNS: list[tuple[Kind, re.Pattern[str]]] = [
    (kind, re.compile(template + _PICTURE)) for kind, template in _TEMPLATES
]
_NOUN = re.compile(rf"(?P<head>[a-z]+(?: (?!at |on |next )[a-z]+){{0,4}}?)(?: (?P<tail>{_RELATION} .+))?")
_TAIL = re.compile(rf"(?P<relation>{_RELATION}) (?P<article>the|an?) (?P<anchor>[a-z]+(?: [a-z]+){{0,4}})")


def parse(question: str) -> Question | None:
    """The typed form of a template question, or None where it follows no template."""
    text = re.sub(r"\s+", " ", question).strip().rstrip("?. ").lower()
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        terms = match.groupdict()
        nouns = [_noun(terms[name], kind) for name in ("subject", "other") if terms.get(name)]
        if all(noun is not None for noun in nouns):
            return Question(kind, *nouns)
    return None


def _noun(text: str, kind: Kind) -> Noun | None:
    match = _NOUN.fullmatch(text)
    if match is None:
        return None
    head = singular(match["head"])
    tail = ""
    if match["tail"]:
        place = _TAIL.fullmatch(match["tail"])
        if place is None:
            return None
        anchor = singular(place["anchor"])
        tail = f"{place['relation']} " + (f"the {anchor}" if place["article"] == "the" else with_article(anchor))
    return Noun(head, tail, many=kind != "presence" and match["head"] != head)


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(question: Question, rng: Random, held_out: bool = False) -> str:
    """Put a typed question into words of the training bank, or of the held-out one."""
    bank, places = (HELD_OUT, HELD_OUT_PLACES) if held_out else (TRAIN, PLACES)
    slots = {"where": rng.choice(places)}
    if question.subject is not None:
        slots |= _subject_slots(question.subject, one_or_many=question.kind == "location")
    if question.other is not None:
        slots["other"] = _phrase(plural(question.other.head), question.other.tail)
    text = rng.choice(bank[question.kind]).format(**slots)
    return text[0].upper() + text[1:]


def rephrase(question: str, rng: Random, held_out: bool = False) -> str:
    """The same question in other words; unchanged where it follows no known template."""
    meaning = parse(question)
    return question if meaning is None else ask(meaning, rng, held_out)


def presence_question(label: str, rng: Random, held_out: bool = False, unseen_names: bool = False) -> str:
    """Ask whether something with this presence label is there, by one of the label's names.

    `held_out` takes a sentence, `unseen_names` a name that no training uses.
    """
    words = singular(label.replace("_", " "))
    known, unseen = NAMES.get(label, ((words,), (words,)))
    return ask(Question("presence", Noun(rng.choice(unseen if unseen_names else known))), rng, held_out)


def askable_labels(presence: Mapping[str, bool]) -> list[str]:
    """The labels of an image that a yes or no follows from, in sorted order.

    Left out: labels whose "no" is only the annotators' convention, such as water in a picture of the sea.
    """
    return [
        label
        for label in sorted(presence)
        if presence[label] or not any(presence.get(other, False) for other in IMPLIED_BY.get(label, ()))
    ]


def presence_questions(record: Record, rng: Random, held_out: bool = False) -> list[QA]:
    """Yes/no questions from the presence labels of one image, as many of either answer for each label over a data set.

    A label that a share p of the images carries is asked where it is there with probability min(1, (1 - p) / p) and
    where it is not with min(1, p / (1 - p)). So the question alone does not tell the answer: a model has to look.
    """
    questions = []
    for label in askable_labels(record.presence):
        there = record.presence[label]
        share = _SHARES.get(label, 0.5)
        odds = (1 - share) / share
        if rng.random() < (odds if there else 1 / odds):
            questions.append(QA(presence_question(label, rng, held_out), "yes" if there else "no", "presence"))
    return questions


def scene_question(scene: str, rng: Random, held_out: bool = False) -> QA:
    """Ask for the kind of scene; the answer is the class name in words."""
    return QA(ask(Question("theme"), rng, held_out), scene_words(scene), "theme")


def scene_words(scene: str) -> str:
    """A scene class in the words an answer uses: "agricultural" -> "farmland", "golf_course" -> "golf course"."""
    return {"agricultural": "farmland"}.get(scene, scene.replace("_", " "))


def banks(held_out: bool) -> Sequence[str]:
    """All phrasings of one side, to check that the sides share none."""
    return [text for texts in (HELD_OUT if held_out else TRAIN).values() for text in texts]


# Share of the UCM training images that carry each label.
_SHARES = {
    "airplane": 0.05, "bare_soil": 0.34, "buildings": 0.33, "cars": 0.43, "chaparral": 0.05, "court": 0.05,
    "dock": 0.05, "field": 0.05, "grass": 0.48, "mobile_home": 0.05, "pavement": 0.62, "sand": 0.13, "sea": 0.05,
    "ship": 0.05, "tanks": 0.05, "trees": 0.48, "water": 0.1,
}  # fmt: skip


def _subject_slots(subject: Noun, one_or_many: bool) -> dict[str, str]:
    one = _phrase(with_article(subject.head), subject.tail)
    some = _phrase(plural(subject.head), subject.tail)
    many = subject.many if one_or_many else not is_mass(subject.head)
    the = "the " + (plural(subject.head) if many else subject.head)
    are, do = ("are", "do") if many else ("is", "does")
    slots = {"one": one, "some": some, "the": _phrase(the, subject.tail), "are": are, "do": do}
    return slots | {name.capitalize(): value[0].upper() + value[1:] for name, value in slots.items()}


def _phrase(noun: str, tail: str) -> str:
    return f"{noun} {tail}" if tail else noun
