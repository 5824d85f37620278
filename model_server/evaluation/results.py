"""What an evaluation yields: rows of one schema, and the notes on what could not be measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

Controls = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """One figure. Fractions lie in 0..1, CIDEr in its own unit (3.88, not 388).

    `n` is the number of images for captions and scenes, of questions for answers. `controls` holds the same measure of
    answers that did not look at the image, or only looked it up; None where the data for a control are missing.
    """

    set: str
    split: str
    task: str
    protocol: str
    metric: str
    value: float
    n: int
    controls: Controls = field(default_factory=dict)


@dataclass(frozen=True)
class SetInfo:
    """What a table has to say about a set: how many images were used, of how many, and their usual size."""

    name: str
    images: int
    available: int
    pixels: str


@dataclass
class Results:
    """Everything one run measured. `notes` say what is absent and why."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sets: list[SetInfo] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the rows as a JSON list."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1, allow_nan=False) + "\n")
