"""What callers may ask with: trimmed, and refused with the limit where it is beyond one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from model_server.protocol import MAX_CLASSES, MAX_LABEL_LENGTH, MAX_LABELS, MAX_TEXT
from rs_tools.errors import InputError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]")  # signs of no script, which XML cannot hold


def checked_question(question: str) -> str:
    text = _plain(question, "question")
    if not text:
        raise InputError("The question is empty; ask one question about what is visible.")
    if len(text) > MAX_TEXT:
        raise InputError(f"The question has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text


def checked_phrase(phrase: str, name: str) -> str:
    text = _plain(phrase, name)
    if not text:
        raise InputError(f"The {name} is empty; name what to look for, such as 'ship' or 'white car'.")
    if len(text) > MAX_TEXT:
        raise InputError(f"The {name} has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text


def checked_classes(classes: Sequence[str]) -> list[str]:
    """Trimmed classes without repeats, in order."""
    checked = _listed(classes, "classes", "class")
    if not 1 <= len(checked) <= MAX_CLASSES:
        raise InputError(f"Give 1 to {MAX_CLASSES} classes, such as ['water', 'forest']; there are {len(checked)}.")
    for one in checked:
        if not 1 <= len(one) <= MAX_LABEL_LENGTH:
            raise InputError(f"A class has 1 to {MAX_LABEL_LENGTH} characters; {one[:40]!r} has {len(one)}.")
    return checked


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Trimmed labels without repeats; none is fine and means the model's own classes."""
    checked = _listed(labels, "labels", "label")
    if not checked:
        return []
    if len(checked) == 1 and checked != [""]:
        raise InputError("One label leaves nothing to choose; give at least two, or none for the model's own classes.")
    if len(checked) > MAX_LABELS:
        raise InputError(f"There are {len(checked)} labels; at most {MAX_LABELS} are allowed.")
    for label in checked:
        if not 1 <= len(label) <= MAX_LABEL_LENGTH:
            raise InputError(f"A label has 1 to {MAX_LABEL_LENGTH} characters; {label[:40]!r} has {len(label)}.")
    return checked


def _listed(texts: Sequence[str], names: str, name: str) -> list[str]:
    if isinstance(texts, str):  # which is a sequence, too: of letters
        raise InputError(f"The {names} are one text, {texts[:40]!r}; give a list of texts.")
    return list(dict.fromkeys(_plain(text, name) for text in texts))


def _plain(text: str, name: str) -> str:
    """Text with single spaces in place of white space and control characters."""
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise InputError(f"The {name} holds half a character (a lone surrogate); send whole Unicode text.")
    return " ".join(_CONTROL.sub(" ", text).split())
