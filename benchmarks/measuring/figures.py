"""Figures and how they are shown: as tables in markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Row = Sequence[str]


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def head(columns: Row) -> str:
    """The two lines above the rows."""
    return f"{line(columns)}\n{line(['---'] * len(columns))}"


def markdown(columns: Row, rows: Sequence[Row]) -> str:
    return "\n".join([head(columns), *map(line, rows)])
