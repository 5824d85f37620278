"""Results as tables: on the terminal and as the Markdown page that is kept beside the code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model_server.evaluation.results import Results, Row
from model_server.protocol import ModelInfo

# Highest published figures, (set, protocol, metric) -> value and who reported it, all on official test splits.
ANCHORS: dict[tuple[str, str, str], tuple[float, str]] = {
    ("ucm", "coco", "bleu1"): (0.8825, "Aquila"),
    ("ucm", "coco", "bleu4"): (0.7992, "MF-RSVLM"),
    ("ucm", "coco", "rouge_l"): (0.8851, "MF-RSVLM"),
    ("ucm", "coco", "cider"): (3.879, "MF-RSVLM"),
    ("rsicd_aid", "coco", "bleu1"): (0.746, "Aquila"),
    ("rsicd_aid", "top1", "accuracy"): (0.9437, "AID, best published"),
    ("rsvqa_lr", "rsvqa-geochat", "mean_accuracy"): (0.9272, "Aquila"),
    ("rsvqa_hr", "rsvqa-geochat", "mean_accuracy"): (0.9264, "Aquila"),
}

_TITLES = {"caption": "Captions", "classify": "Scene class", "vqa": "Questions"}

_PROTOCOLS = {
    "coco": "BLEU (corpus, closest reference length), ROUGE-L and CIDEr-D over all references, as pycocoevalcap "
    "computes them. Tokenizer: lower case, punctuation to spaces (not the Java one). No METEOR, which needs Java.",
    "top1": "the highest score over the closed list of all classes of the set. `ece`: calibration error, 15 bins.",
    "exact": "normalised exact match with the answer in the data: over all questions (`accuracy`), per type, mean over "
    "types (`mean_accuracy`). `ece`: calibration error, 15 bins. `coverage`: share of questions that the model did not "
    "abstain from; `selective_accuracy`: accuracy of those.",
    "exact/held-out-phrasing": "the same questions in sentences that no training used.",
    "rsvqa-geochat": "without counts and areas; the papers report `mean_accuracy`.",
    "rsvqa-full": "all types; LR counts and HR areas in the bins 0, to 10, to 100, to 1000, above.",
    "presence-labels": "a yes/no question for every presence label of every image, in sentences of the training bank. "
    "Left out are labels whose `no` is only the annotators' convention (water in a picture of the sea, buildings among "
    "mobile homes).",
    "presence-labels/held-out-phrasing": "the same in sentences that no training used.",
    "presence-labels/held-out-names": "the same in sentences of the training bank, with names of the things that no "
    "question in training used (automobile, aeroplane, ...).",
}

_CONTROLS = {
    "constant": "the training caption with the highest CIDEr on the training images, said of every image",
    "neighbours32": "the caption that the 32 nearest training images (by the model's own features) agree on best",
    "majority": "the commonest training answer to the same question (or label, or type), or the commonest class",
    "blind": "the model, shown only the mean colour of the image",
}


def print_tables(results: Results, console: Console) -> None:
    """Print one table for each task and protocol, then what is absent and why."""
    for (task, protocol), rows in _by_protocol(results.rows):
        header, lines = _table(results, rows)
        table = Table(*(escape(name) for name in header), title=f"{_TITLES[task]}, protocol {protocol}")
        for line in lines:
            table.add_row(*(escape(cell) for cell in line))
        console.print(table)
    for note in results.notes:
        console.print(f"absent: {escape(note)}")


def markdown(results: Results, info: ModelInfo, command: str, date: str) -> str:
    """The page of results: what was measured, on what, against what, and how to measure it again."""
    lines = [
        "# Results",
        "",
        f"Written on {date} by the evaluation itself; do not edit. Again:",
        "",
        f"    {command}",
        "",
        f"Model `{info.model}`, weights `{info.weights_digest}`, {info.precision} on {info.device}.",
        "",
        "Fractions lie in 0..1; CIDEr is in its own unit. `n` counts images for captions and scenes, questions for "
        "answers. Published figures come from official test splits, often from larger images and by other conventions, "
        "so they are no comparison on equal terms. Compare with the controls of the same row.",
        "",
        "| set | images used | of | pixels |",
        "| --- | --- | --- | --- |",
        *(f"| {s.name} | {s.images} | {s.available} | {s.pixels} |" for s in results.sets),
    ]
    for task, rows in groupby(sorted(results.rows, key=lambda row: _ORDER.index(row.task)), key=lambda row: row.task):
        of_task = list(rows)
        lines += ["", f"## {_TITLES[task]}", "", *_controls_used(of_task)]
        for (_, protocol), group in _by_protocol(of_task):
            header, cells = _table(results, group)
            lines += ["", f"`{protocol}`: {_PROTOCOLS[protocol]}", ""]
            lines += [_line(header), _line(["---"] * len(header)), *(_line(line) for line in cells)]
    if results.notes:
        lines += ["", "## Absent", "", *(f"- {note}" for note in results.notes)]
    return "\n".join(lines) + "\n"


_ORDER = tuple(_TITLES)


def _by_protocol(rows: Sequence[Row]) -> Iterable[tuple[tuple[str, str], list[Row]]]:
    order = list(_PROTOCOLS)
    ranked = sorted(rows, key=lambda row: (_ORDER.index(row.task), order.index(row.protocol)))
    for key, group in groupby(ranked, key=lambda row: (row.task, row.protocol)):
        yield key, list(group)


def _table(results: Results, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    pixels = {info.name: info.pixels for info in results.sets}
    controls = list(dict.fromkeys(name for row in rows for name in row.controls))
    anchored = any(_anchor(row) for row in rows)
    header = ["set", "split", "pixels", "metric", "n", "ours", *controls, *(["published"] if anchored else [])]
    lines = []
    for row in rows:
        cells = [row.set, row.split, pixels.get(row.set, ""), row.metric, str(row.n), f"{row.value:.3f}"]
        cells += [_figure(row.controls.get(name)) for name in controls]
        lines.append(cells + ([_anchor(row)] if anchored else []))
    return header, lines


def _anchor(row: Row) -> str:
    value, source = ANCHORS.get((row.set, row.protocol, row.metric), (None, ""))
    return "" if value is None else f"{value:.3f} ({source})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _controls_used(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.controls)
    return [f"- *{name}*: {_CONTROLS[name]}" for name in names]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
