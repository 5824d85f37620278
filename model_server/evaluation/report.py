"""Results as tables: on the terminal and as the Markdown page that is kept beside the code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model_server.evaluation.results import Controls, Results, Row
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

# Published figures on sets that are not evaluated here, for the order of magnitude.
ELSEWHERE = {
    "ground": "FUSAR-GPT on its SAR ships: F1@0.25 0.748, F1@0.5 0.587.",
    "segment": "RSUniVLM zero-shot, mean IoU: Vaihingen 0.545, UDD5 0.654, VDD 0.496.",
    "detect_change": "WHU-CD F1: SemiCD 0.788 with 5 % of the labels, RSUniVLM 0.714 zero-shot.",
    "refer": "RSUniVLM on VRSBench: acc50 0.693, acc70 0.475 (`vrsbench`); GeoViS on DIOR-RSVG: acc50 0.798.",
    "count": "FUSAR-GPT on its SAR ships: exact 0.525.",
}

_TITLES = {
    "caption": "Captions",
    "classify": "Scene class",
    "vqa": "Questions",
    "ground": "Objects of a phrase",
    "segment": "Masks of classes",
    "detect_change": "Change",
    "refer": "Phrases for one object",
    "count": "Counts",
    "retrieve": "Retrieval",
}

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
    "map": "every label of the set is asked on every image. AP as pycocotools computes it (101 recalls, 100 boxes an "
    "image), at IoU 0.5, 0.75, 0.3 and the mean of 0.5 to 0.95; F1 of the boxes that reach the answer's own threshold, "
    "at IoU 0.5, 0.25 and 0.4. Over all labels AP is the mean, F1 is of all boxes together. `n` counts true boxes.",
    "map/held-out-phrasing": "the same, asked in words that no training used; the mean over a label's phrasings.",
    "absent": "`hallucination`: the share of images on which an object is asserted that the labels deny, of a phrase "
    "that the model claims to know and with a score at the threshold; lower is better. One line for each phrase; "
    "`per_question`: of all pairs of an image and a denied phrase; `distractors`: of those with a thing that no image "
    "of the set holds (wind turbine, elephant, ...). Beside it, how often what the labels affirm is "
    "asserted. On rsicd_aid the name of the scene stands for labels: ships lie at water, airplanes at airports.",
    "elsewhere": "ships of sensors and scales of which no training had a box; of UCM it had the labels of whole "
    "images, a ship somewhere or none, and the threshold of ships on coarse radar was fitted on the validation "
    "split's chips. `presence_f1` (and `presence_precision`, `presence_recall`): an image is said to hold a ship where "
    "one reaches the threshold, against the label of the whole image. `centre`: chips with one ship in the middle, the "
    "share on which a box at the threshold covers it; `centre_length`: one whose longer side is the ship's known "
    "length within a factor of 2; `off_centre`: the share of points halfway to the corners that a box covers; "
    "`boxes`: how many a chip. `n` counts images.",
    "miou": "all pixels of all images counted together, at the thresholds of the checkpoint, each class by itself; the "
    "mean leaves out background. `boundary_f1`: boundaries within 0.75 % of the image's diagonal of each other. `n` "
    "counts images.",
    "miou/held-out-phrasing": "the same, asked in words that no training used; the mean over a class's phrasings.",
    "binary": "the changed class over all pixels of all pairs, at the threshold of the checkpoint. `n` counts pairs.",
    "still": "the share of pixels called changed, at the same threshold, where nothing changed: an image and itself, "
    "as it is and in other light (contrast, brightness, gamma, colour); lower is better.",
    "facts": "what the caption of a change claims, each pair as a whole and its four quarters where labels know a "
    "change (no set has captions of change to compare with). `place`: the largest region lies in the ninth that is "
    "named; `place_holds`: that ninth holds at least a ninth of the labelled change; `amount`: the changed share is "
    "right within a factor of 2; `amount_error`: its mean absolute error. `n` counts wholes and quarters.",
    "iou": "phrases made from boxes where they leave no doubt (the largest ship, the car in the upper left), asked as "
    "they are; the best box of the answer, IoU of at least 0.5 or 0.7 in pixels of the image. `n` counts phrases.",
    "vrsbench": "the same phrases and boxes by VRSBench's convention: integers 0 to 100, each of them a pixel wide.",
    "mae": "boxes that reach the threshold against labelled ones: mean absolute error, and the share of exact counts. "
    "`n` counts pairs of image and label, also those whose count is 0.",
    "recall": "a right candidate among the best 1, 5 and 10, by the contrastive head; only an image's own captions are "
    "right. Ties are broken at random (the expectation). Without a direction: the mean of both.",
    "recall/same-text": "the same, where an image is right for any caption that it was given word for word.",
}

_CONTROLS = {
    "constant": {
        "caption": "the training caption with the highest CIDEr on the training images, said of every image",
        "ground": "the boxes of the training image with the median number of them, on every image",
        "refer": "the median training box of the label",
    },
    "neighbours32": "the caption that the 32 nearest training images (by the model's own features) agree on best",
    "majority": {
        "segment": "every pixel is the commonest class of the training masks, background among them",
        "": "the commonest training answer to the same question (or label, or type), or the commonest class",
    },
    "blind": {
        "vqa": "the model, shown only the mean colour of the image; reworded questions have the blind answers to the "
        "first wording",
        "refer": "the model, shown only the mean colour of the image and asked for the label",
        "": "the model, shown only the mean colour of the image",
    },
    "present": "the share of images on which such a thing is asserted where the labels say that it is there",
    "whole": "one box, the whole chip",
    "always": "a ship on every image",
    "label_words": "the same labels in their own words",
    "everything": "every pixel is of the class",
    "all_changed": "every pixel has changed",
    "none_changed": "no pixel has changed",
    "centre": "the centre and the median labelled share, whatever is seen",
    "dropped_before": "the model, shown only the mean colour of the first image",
    "label_only": "the best box for the label alone, without what singles out the object",
    "text": "the number in the text answer to `How many ... are there?`",
    "median": "the median count of the training images",
    "chance": "candidates in random order",
}

Line = tuple[str, str, int, str, dict[str, float]]  # set, part, n, who, figures by metric


def print_tables(results: Results, console: Console) -> None:
    """Print one table for each task and protocol, then what is absent and why."""
    for (task, protocol), rows in _by_protocol(results.rows):
        header, lines = _table(rows)
        table = Table(*(escape(name) for name in header), title=f"{_TITLES[task]}, protocol {protocol}")
        for line in lines:
            table.add_row(*(escape(cell) for cell in line))
        console.print(table)
    for note in _gathered(results.notes):
        console.print(f"absent: {escape(note)}")


def markdown(results: Results, info: ModelInfo, command: str, date: str, appendix: Sequence[str] = ()) -> str:
    """The page of results: what was measured, on what, against what, and how to measure it again.

    `appendix` are the lines of further sections.
    """
    splits = ", ".join(dict.fromkeys(row.split for row in results.rows))
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
        "answers, and what the protocol says elsewhere. Published figures come from official test splits, often from "
        "larger images and by other conventions, so they are no comparison on equal terms. Compare with the controls "
        "below each line of ours. Where `n` is small, a figure only shows that nothing is broken.",
        "",
        f"Split: {splits}.",
        "",
        "| set | images used | of | pixels |",
        "| --- | --- | --- | --- |",
        *(f"| {s.name} | {s.images} | {s.available} | {s.pixels} |" for s in results.sets),
    ]
    for task, rows in groupby(sorted(results.rows, key=lambda row: _ORDER.index(row.task)), key=lambda row: row.task):
        of_task = list(rows)
        lines += ["", f"## {_TITLES[task]}", "", *_controls_used(task, of_task)]
        if task in ELSEWHERE:
            lines += ["", f"Published on other data: {ELSEWHERE[task]}"]
        for (_, protocol), group in _by_protocol(of_task):
            header, cells = _table(group)
            lines += ["", f"`{protocol}`: {_PROTOCOLS[protocol]}", ""]
            lines += [_line(header), _line(["---"] * len(header)), *(_line(line) for line in cells)]
    lines += appendix
    if results.notes:
        lines += ["", "## Absent", "", *(f"- {note}" for note in _gathered(results.notes))]
    return "\n".join(lines) + "\n"


def embeddings_section(folder: Path) -> list[str]:
    """What the page on AlphaEarth embeddings beside the report says in short; nothing where there is no such page."""
    page = folder / "AEF.md"
    if not page.is_file():
        return []
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.strip()]
    table = [line for line in rows if line.startswith("|")]
    said = [line for line in rows if line.startswith("Against ")]
    return [
        "",
        "## Radar with AlphaEarth embeddings",
        "",
        f"The dropped-modality control of the modulation, on points rather than images; the whole is in [{page.name}]"
        f"({page.name}). Accuracy in percent on a held-out region.",
        "",
        *table,
        *(["", *said] if said else []),
    ]


_ORDER = tuple(_TITLES)


def _by_protocol(rows: Sequence[Row]) -> Iterable[tuple[tuple[str, str], list[Row]]]:
    order = list(_PROTOCOLS)
    ranked = sorted(rows, key=lambda row: (_ORDER.index(row.task), order.index(row.protocol)))
    for key, group in groupby(ranked, key=lambda row: (row.task, row.protocol)):
        yield key, list(group)


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One protocol: a column for each metric, a line for each set (and part of it) and who answered."""
    metrics = list(dict.fromkeys(_metric(row) for row in rows))
    header = ["set", "of", "n", "", *metrics]
    cells = []
    for name, part, n, who, figures in _lines(rows):
        shown = f"**{who}**" if who == "ours" else who
        cells.append([name, part, str(n), shown, *(_figure(figures.get(metric)) for metric in metrics)])
    return header, cells


def _lines(rows: Sequence[Row]) -> Iterable[Line]:
    """Ours, each control and what was published, of one set and part after another. `n` is that of the first metric."""
    ranked = sorted(rows, key=_place(rows))
    parts = {key: list(group) for key, group in groupby(ranked, key=lambda row: (row.set, _part(row)))}
    for (name, part), of_part in parts.items():
        if part and sum(key[0] == name for key in parts) == 2 and _said(of_part) == _said(parts.get((name, ""), [])):
            continue  # the set's only label, whose figures stand in the line above
        n = of_part[0].n
        yield name, part, n, "ours", {_metric(row): row.value for row in of_part}
        for control in dict.fromkeys(who for row in of_part for who in row.controls):
            known = {_metric(row): row.controls.get(control) for row in of_part}
            figures = {metric: value for metric, value in known.items() if value is not None}
            if figures:
                yield name, part, n, control, figures
        keys = {row.metric: (row.set, row.protocol, row.metric) for row in of_part}
        anchors = {metric: ANCHORS[key] for metric, key in keys.items() if key in ANCHORS}
        for source in dict.fromkeys(source for _, source in anchors.values()):
            yield name, part, n, f"published: {source}", {m: v for m, (v, s) in anchors.items() if s == source}


def _place(rows: Sequence[Row]):
    """A sort key that brings the rows of one set and part together and keeps their order otherwise."""
    order = {key: i for i, key in enumerate(dict.fromkeys((row.set, _part(row)) for row in rows))}
    sets = {name: i for i, name in enumerate(dict.fromkeys(row.set for row in rows))}
    return lambda row: (sets[row.set], order[row.set, _part(row)])


def _said(rows: Sequence[Row]) -> list[tuple[str, float, Controls]]:
    return [(_metric(row), row.value, row.controls) for row in rows]


def _metric(row: Row) -> str:
    return row.metric.partition("/")[0]


def _part(row: Row) -> str:
    return row.metric.partition("/")[2]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _gathered(notes: Sequence[str]) -> list[str]:
    """Notes that say the same of several sets as one: `ucm: no boxes`, `flood: no boxes` -> `no boxes: ucm, flood`."""
    reasons: dict[str, list[str]] = {}
    for note in notes:
        name, _, reason = note.partition(": ")
        reasons.setdefault(reason, []).append(name)
    return [f"{reason}: {', '.join(names)}" for reason, names in reasons.items()]


def _controls_used(task: str, rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.controls)
    return [f"- *{name}*: {_meaning(_CONTROLS[name], task)}" for name in names]


def _meaning(text: str | Mapping[str, str], task: str) -> str:
    return text if isinstance(text, str) else text[task if task in text else ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
