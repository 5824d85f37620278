"""One section of the page of results replaced in its place, by the command that measured it anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = "RESULTS.md"
LAST = "## Absent"


def put(folder: Path, section: Sequence[str]) -> bool:
    """Write a section (a blank line, its `## ` title, its lines) into the folder's page; False where it has none.

    It takes the place of the section of that title; a new one stands before "Absent", or last.
    """
    page = folder / PAGE
    if not page.is_file() or not section:
        return False
    lines = ["", *page.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    titles = [lines[i] for i in starts]
    if section[1] in titles:
        at = titles.index(section[1])
        start, end = starts[at] - 1, starts[at + 1] - 1 if at + 1 < len(starts) else len(lines)
    else:
        start = end = starts[titles.index(LAST)] - 1 if LAST in titles else len(lines)
    page.write_text("\n".join([*lines[1:start], *section, *lines[end:]]) + "\n", encoding="utf-8")
    return True
