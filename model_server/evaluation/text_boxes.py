"""`python -m model_server.evaluation.text_boxes DATA_DIR --expert RUN/region.pt --out docs`: boxes in two ways.

Text as in the papers (`[VG]`, written by the region expert that stage `region` trains) and the dense heads that the
tools use, on the same images, asked in the same words at the same scales, measured by the same code: AP and F1 of all
boxes of a label, and the one box of a phrase that means one. Figures go to `text_boxes.json` and, as a section, into
the folder's RESULTS.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from model_server.evaluation.asking import Answering
from model_server.evaluation.dataset import EvaluatedSet, read_set
from model_server.evaluation.grounding import box_figures, found_boxes
from model_server.evaluation.labelled import box_labels, true_boxes, words_for
from model_server.evaluation.looking import find
from model_server.evaluation.options import Data, Limit, Sets, Split, Weights, held, named
from model_server.evaluation.page import put
from model_server.evaluation.referring import evaluate_referring
from model_server.evaluation.results import Results
from model_server.evaluation.text_grounding import TextGrounder
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver
from model_server.training.records import set_names
from model_server.training.region import SETS

ALL_SETS = ",".join(SETS)
JSON = "text_boxes.json"
MEASURES = ("ap50", "ap75", "f1_50", "f1_25")
TEXT, DENSE, BLIND = "text", "dense heads", "text, blind"


@dataclass(frozen=True)
class Figures:
    """One way on one label of a set (all labels: an empty `of`); `n` counts true boxes, or phrases where `refer`."""

    set: str
    of: str
    n: int
    way: str
    values: Mapping[str, float]
    refer: bool = False


def measure(model: Answering, data: EvaluatedSet, way: str, blind: str | None = None) -> list[Figures]:
    """Detection and referring figures of one way; of its blind control too, where that has a name."""
    data = replace(data, found={}, answered={})
    records = [record for record in data.records if len(record.images) == 1]
    labels = [label for label in box_labels(data) if any(len(true_boxes(record, label)) for record in records)]
    counts = {label: sum(len(true_boxes(record, label)) for record in records) for label in labels}
    out = []
    for name, hidden in ((way, False), (blind, True)):
        if name is None or not labels:
            continue
        find(model, data, records, lambda _: [words_for(n) for n in labels], f"boxes, {name}", hidden)
        found = {label: found_boxes(data, records, label, words_for(label), hidden) for label in labels}
        figures = box_figures(found)
        for of in ("", *labels) if len(labels) > 1 else ("",):
            values = {m: figures[f"{m}/{of}" if of else m] for m in MEASURES}
            out.append(Figures(data.name, of, counts[of] if of else sum(counts.values()), name, values))
    results = Results()
    evaluate_referring(model, data, results)
    strict = [row for row in results.rows if row.protocol == "iou"]
    if strict:
        acc = {row.metric: row.value for row in strict}
        out.append(Figures(data.name, "", strict[0].n, way, acc, refer=True))
        if blind is not None:
            blinded = {row.metric: value for row in strict if (value := row.controls["blind"]) is not None}
            out.append(Figures(data.name, "", strict[0].n, blind, blinded, refer=True))
    return out


def section(folder: Path) -> list[str]:
    """Both ways side by side, where they have been measured into the folder."""
    if not (folder / JSON).is_file():
        return []
    stored = json.loads((folder / JSON).read_text(encoding="utf-8"))
    figures = [Figures(**row) for row in stored["figures"]]
    lines = [
        "",
        "## Boxes as text and from the dense heads",
        "",
        "The same images and phrases, by the text that the region expert writes (RSUniVLM's way: a copy of the "
        f"feed-forward layers, trained alone, {stored['steps']} steps) and by the dense heads, which the tools use, "
        f"with the weights `{stored['weights']}` "
        "(`python -m model_server.evaluation.text_boxes DATA_DIR --expert RUN/region.pt --out docs`). Protocols `map` "
        "and `iou`; every box that was written counts, its score is the mean probability of its tokens.",
    ]
    for refer, what in ((False, "All boxes of a label; `n` counts true boxes."), (True, "One thing among its like.")):
        rows = [f for f in figures if f.refer == refer]
        if rows:
            lines += ["", what, "", *_table(rows)]
    return lines


def _table(rows: Sequence[Figures]) -> list[str]:
    names = list(rows[0].values)
    ways = list(dict.fromkeys(row.way for row in rows))
    order = list(dict.fromkeys((row.set, row.of) for row in rows))
    ranked = sorted(rows, key=lambda row: (order.index((row.set, row.of)), ways.index(row.way)))
    return [
        f"| set | of | n |  | {' | '.join(names)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in names)} |",
        *(
            f"| {row.set} | {row.of} | {row.n} | {row.way} | {' | '.join(f'{row.values[n]:.3f}' for n in names)} |"
            for row in ranked
        ),
    ]


def run(ways: Mapping[str, Answering], data: Path, sets: Sequence[str], split: str, limit: int | None,
        folder: Path) -> list[Figures]:  # fmt: skip
    """Measure every way on those of the sets that are there; the text way blind as well."""
    figures = []
    for name in (name for name in sets if name in set_names(data)):
        one = read_set(data, data, name, split, limit, folder)
        for way, model in ways.items():
            figures += measure(model, one, way, BLIND if way == TEXT else None)
    return figures


def write(figures: Sequence[Figures], weights: str, steps: int, folder: Path) -> None:
    """The figures, and their section where the folder has a page of results."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"weights": weights, "steps": steps, "figures": [asdict(figure) for figure in figures]}
    (folder / JSON).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    put(folder, section(folder))


def main(
    data: Data,
    expert: Annotated[Path, typer.Option(help="region.pt of a run")],
    out: Annotated[Path, typer.Option(help=f"folder for {JSON}; its RESULTS.md is brought up to date")],
    sets: Sets = ALL_SETS,
    split: Split = "val",
    weights: Weights = DEFAULT_WEIGHTS,
    limit: Limit = None,
) -> None:
    """Measure both ways, print, write."""
    names = held(data, named(sets))
    dense = Perceiver.load(weights)
    if "ground" not in dense.tasks:
        raise typer.BadParameter(f"{weights} has no dense branch to compare with; export one into it first")
    ways: dict[str, Answering] = {TEXT: TextGrounder(weights, expert), DENSE: dense}
    figures = run(ways, data, names, split, limit, out)
    write(figures, dense.info.weights_digest, int(torch.load(expert, weights_only=True)["step"]), out)
    for figure in figures:
        values = "  ".join(f"{name} {value:.3f}" for name, value in figure.values.items())
        typer.echo(f"{figure.set:16} {figure.of:12} n={figure.n:<4} {figure.way:12} {values}")


if __name__ == "__main__":
    typer.run(main)
