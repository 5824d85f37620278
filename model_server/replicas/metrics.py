"""Metrics of several processes as one page in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping


def merged(pages: Mapping[str, str]) -> str:
    """Every sample of each process's page, with the process's name as the label `replica`.

    They are not added up: a counter that a replica takes with it when it goes would look like one that was reset.
    """
    families: dict[str, list[str]] = {}
    for name, page in pages.items():
        head = ""
        for line in page.splitlines(keepends=True):
            if line.startswith("# HELP"):
                head = line
            elif line.startswith("# TYPE"):
                head += line
            else:
                families.setdefault(head, []).append(_labelled(line, name))
    return "".join(head + "".join(lines) for head, lines in families.items())


def _labelled(line: str, replica: str) -> str:
    series, brace, rest = line.partition("{")
    if brace:
        return f'{series}{{replica="{replica}",{rest}'
    series, _, value = line.partition(" ")
    return f'{series}{{replica="{replica}"}} {value}'
