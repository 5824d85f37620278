"""`python -m model_server.evaluation.scale DATA_DIR --out DIR`: what is lost as pixels grow on the ground.

Every image is resampled to pixels 1, 2, 4 and 8 times as large by averaging, and the same is asked again: captions
(CIDEr), scene class (accuracy), ships and cars (AP at IoU 0.5). Where an image's ground sampling distance is known, the
model is told the new one. Writes the figures to `scale.json` and their curves, relative to the native scale, to
`scale.png`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from model_server.evaluation.asking import Model, ask
from model_server.evaluation.caption_metrics import cider, tokenize
from model_server.evaluation.dataset import EvaluatedSet, read_set
from model_server.evaluation.dense_metrics import ImageBoxes, average_precision
from model_server.evaluation.labelled import true_boxes, words_for
from model_server.evaluation.looking import as_arrays, look, modality
from model_server.evaluation.options import Data, Limit, Sets, Split, Weights, held, named
from model_server.evaluation.page import put
from model_server.evaluation.plot import line_plot
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query
from model_server.protocol import Task, TaskNotServed, TileCaption, TileClasses, TileObjects
from model_server.training.records import Record, load_image, set_names

FACTORS = (1, 2, 4, 8)
SETS = ("ucm", "inshore_ships", "estonia_aerial")
ALL_SETS = ",".join(SETS)
LABELS = ("ship", "car")
JSON, PNG = "scale.json", "scale.png"
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Curve:
    """One measure of one set at every factor. `gsd_m` is the native one, None where unknown or mixed."""

    set: str
    measure: str
    n: int
    gsd_m: float | None
    values: tuple[float, ...]


def coarser(image: np.ndarray, factor: int) -> np.ndarray:
    """The image with pixels `factor` times as large, the mean of what they cover: uint8 [H / factor, W / factor, 3]."""
    if factor == 1:
        return image
    height, width = (max(1, round(side / factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def measure_scales(model: Model, data: EvaluatedSet) -> list[Curve]:
    """The curves that the set's annotations allow."""
    kinds: list[tuple[str, list[Record], Callable[[list[Record], int], float]]] = [
        ("caption CIDEr", [r for r in data.records if r.captions], lambda rs, f: _cider(model, rs, f)),
        ("scene accuracy", [r for r in data.records if r.scene], lambda rs, f: _accuracy(model, data, rs, f)),
    ]
    for label in LABELS:
        labelled = [r for r in data.records if len(r.images) == 1]
        if any(len(true_boxes(r, label)) for r in labelled):
            kinds.append((f"{label} AP@0.5", labelled, lambda rs, f, label=label: _ap(model, rs, label, f)))
    out = []
    for measure, records, value in kinds:
        if records:
            gsds = {record.gsd_m for record in records}
            gsd_m = gsds.pop() if len(gsds) == 1 else None
            try:
                values = tuple(value(records, factor) for factor in FACTORS)
            except TaskNotServed as error:
                typer.echo(f"{data.name}: no {measure}, {error}", err=True)
                continue
            out.append(Curve(data.name, measure, len(records), gsd_m, values))
    return out


def _query(record: Record, factor: int, task: Task, image: np.ndarray, text: str = "",
           labels: Sequence[str] = ()) -> Query:  # fmt: skip
    gsd_m = None if record.gsd_m is None else record.gsd_m * factor
    return Query(task, image, text=text, labels=tuple(labels), gsd_m=gsd_m, modality=modality(record))


def _cider(model: Model, records: Sequence[Record], factor: int) -> float:
    queries = (_query(r, factor, "caption", coarser(load_image(r.images[0]), factor)) for r in records)
    said = ask(model, queries, len(records), TileCaption, f"captions, pixels x{factor}")
    return cider([tokenize(a.caption) for a in said], [[tokenize(text) for text in r.captions] for r in records])


def _accuracy(model: Model, data: EvaluatedSet, records: Sequence[Record], factor: int) -> float:
    names = [scene.replace("_", " ") for scene in data.scenes]
    queries = (_query(r, factor, "classify", coarser(load_image(r.images[0]), factor), labels=names) for r in records)
    answers = ask(model, queries, len(records), TileClasses, f"scenes, pixels x{factor}")
    best = [answer.labels[int(np.argmax(answer.scores))] for answer in answers]
    return float(np.mean([b == (r.scene or "").replace("_", " ") for b, r in zip(best, records, strict=True)]))


def _ap(model: Model, records: Sequence[Record], label: str, factor: int) -> float:
    found = []
    for record in records:
        image = coarser(load_image(record.images[0]), factor)
        query = _query(record, factor, "ground", image, text=words_for(label))
        (answer,) = look(model, [query], TileObjects)
        boxes, scores, _ = as_arrays(answer)
        height, width = image.shape[:2]
        shares = np.array([width / record.width, height / record.height] * 2)
        found.append(ImageBoxes(boxes, scores, true_boxes(record, label) * shares))
    return average_precision(found)


def write(curves: Sequence[Curve], folder: Path) -> None:
    """The figures and their plot."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"factors": FACTORS, "curves": [asdict(curve) for curve in curves]}
    (folder / JSON).write_text(json.dumps(rows, indent=1) + "\n")
    relative = {
        f"{curve.set}: {curve.measure}": [value / curve.values[0] for value in curve.values]
        for curve in curves
        if curve.values[0] > 0
    }
    if relative:
        labels = [f"x{factor}" for factor in FACTORS]
        line_plot(folder / PNG, "Sensitivity to ground sampling distance", "pixel size, native = x1", labels,
                  "share of the figure at the native scale", relative)  # fmt: skip


def scale_section(folder: Path) -> list[str]:
    """The experiment as a section of the page of results, where it has been run into the same folder."""
    if not (folder / JSON).is_file():
        return []
    stored = json.loads((folder / JSON).read_text())
    lines = [
        "",
        "## Scale",
        "",
        "The same images resampled to larger pixels (`python -m model_server.evaluation.scale DATA_DIR --out docs`).",
        "",
        f"| set | measure | n | native m | {' | '.join(f'x{factor}' for factor in stored['factors'])} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in stored['factors'])} |",
    ]
    for curve in stored["curves"]:
        gsd = "unknown" if curve["gsd_m"] is None else f"{curve['gsd_m']:g}"
        values = " | ".join(f"{value:.3f}" for value in curve["values"])
        lines.append(f"| {curve['set']} | {curve['measure']} | {curve['n']} | {gsd} | {values} |")
    return [*lines, "", f"![curves over pixel size]({PNG})"] if (folder / PNG).is_file() else lines


def run(model: Model, data_dir: Path, sets: Sequence[str], split: str, limit: int | None, folder: Path) -> list[Curve]:
    """Measure those of the sets that are there, and write what was measured."""
    curves = []
    for name in (name for name in sets if name in set_names(data_dir)):
        curves += measure_scales(model, read_set(data_dir, data_dir, name, split, limit, folder))
    write(curves, folder)
    return curves


@app.command()
def main(
    data: Data,
    out: Annotated[Path, typer.Option(help=f"folder for {JSON} and {PNG}")],
    sets: Sets = ALL_SETS,
    split: Split = "val",
    weights: Weights = DEFAULT_WEIGHTS,
    limit: Limit = None,
) -> None:
    """Measure, print, plot; a page of results beside them gets its section anew."""
    names = held(data, named(sets))
    for curve in run(Perceiver.load(weights), data, names, split, limit, out):
        values = "  ".join(f"x{f} {value:.3f}" for f, value in zip(FACTORS, curve.values, strict=True))
        typer.echo(f"{curve.set:16} {curve.measure:16} n={curve.n:<5} {values}")
    put(out, scale_section(out))


if __name__ == "__main__":
    app()
