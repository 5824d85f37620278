"""What callers may ask with: trimmed, and refused with the limit where it is beyond one."""

from __future__ import annotations

from collections.abc import Sequence

from model_server.protocol import MAX_CLASSES, MAX_LABEL_LENGTH, MAX_LABELS, MAX_TEXT
from rs_tools.errors import InputError


def checked_question(question: str) -> str:
    text = " ".join(question.split())
    if not text:
        raise InputError("The question is empty; ask one question about what is visible.")
    if len(text) > MAX_TEXT:
        raise InputError(f"The question has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text


def checked_phrase(phrase: str, name: str) -> str:
    text = " ".join(phrase.split())
    if not text:
        raise InputError(f"The {name} is empty; name what to look for, such as 'ship' or 'white car'.")
    if len(text) > MAX_TEXT:
        raise InputError(f"The {name} has {len(text)} characters; at most {MAX_TEXT} are allowed.")
    return text


def checked_classes(classes: Sequence[str]) -> list[str]:
    """Trimmed classes without repeats, in order."""
    checked = list(dict.fromkeys(" ".join(one.split()) for one in classes))
    if not 1 <= len(checked) <= MAX_CLASSES:
        raise InputError(f"Give 1 to {MAX_CLASSES} classes, such as ['water', 'forest']; there are {len(checked)}.")
    for one in checked:
        if not 1 <= len(one) <= MAX_LABEL_LENGTH:
            raise InputError(f"A class has 1 to {MAX_LABEL_LENGTH} characters; {one[:40]!r} has {len(one)}.")
    return checked


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Trimmed labels without repeats; none is fine and means the model's own classes."""
    checked = list(dict.fromkeys(" ".join(label.split()) for label in labels))
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
