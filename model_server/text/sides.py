"""Which questions are answered otherwise when the image is turned: those that ask for a side of it or name one."""

from __future__ import annotations

import re

_SIDE = re.compile(
    r"\b(?:where(?:abouts)?|left(?:most)?|right(?:most)?|top(?:most)?|upper(?:most)?|bottom(?:most)?|lower(?:most)?"
    r"|above|below|beneath|over|under|corner|side|edge|(?:north|south|east|west)\w*"
    r"|locat\w+|position\w*|placed|situated|part of|direction|orient\w+|horizontal\w*|vertical\w*|diagonal\w*)\b",
    re.IGNORECASE,
)


def names_a_side(question: str) -> bool:
    """Whether the answer may depend on which way up the image is. Says yes too often rather than too seldom."""
    return _SIDE.search(question) is not None
