"""`python -m model_server.evaluation.gallery DATA_DIR --out docs`: the model's worst errors, as pictures.

Every picture is picked by a measure over a split, none by hand, and drawn reduced, with its source, onto one page a
task: `failures_boxes.png`, `failures_masks.png`, `failures_change.png`, `failures_captions.png`,
`failures_answers.png`. Only sets whose terms let an excerpt be shown are looked at (`CREDITS`), so that errors on the
others, among them ships, roads, water, oil and most change, are in the tables of results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw

from model_server.evaluation.asking import Model, ask
from model_server.evaluation.caption_metrics import Cider, tokenize
from model_server.evaluation.dense_metrics import ImageBoxes, match_boxes
from model_server.evaluation.gallery_page import SIDE, Page, Panel, draw, reduced
from model_server.evaluation.labelled import load_mask, mask_values, true_boxes, words_for
from model_server.evaluation.looking import as_arrays, changed, look, modality, outline
from model_server.evaluation.options import Data, Split, Weights, held
from model_server.evaluation.page import put
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query
from model_server.protocol import TaskNotServed, TileCaption, TileClasses, TileObjects, TileVqa
from model_server.text.answers import normalise
from model_server.text.names import readable
from model_server.text.questions import QA
from model_server.training.records import Record, load_image, read_records, set_names

CREDITS = {
    "ucm": "UC Merced: USGS National Map imagery, public domain (Yang & Newsam 2010)",
    "rsvqa_lr": "RSVQA-LR: CC BY 4.0 (Lobry et al. 2020), modified Copernicus Sentinel data",
    "rsvqa_hr": "RSVQA-HR: USGS imagery (Lobry et al. 2020)",
    "estonia_aerial": "Estonia: orthophotos by the Estonian Land Board, open data",
    "neon_trees": "NEON trees: NEON Airborne Observation Platform, open data",
    "amazon_forest": "Amazon: CC BY 4.0 (Zenodo 4498086), modified Copernicus Sentinel data",
    "oscd": "OSCD: modified Copernicus Sentinel data (Daudt et al. 2018)",
}
PANELS = 8  # on a page, at most
LOOK = 320  # pixels of the image that a panel shows, at most
HIT, MISSED, INVENTED = "#ffffff", "#ff2d2d", "#ffd400"
LEGEND = (("missed", MISSED), ("invented", INVENTED))
Corner = tuple[int, int]
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Error:
    """One candidate for a panel: how bad it is, and from which set; the picture is made when it is chosen."""

    badness: float
    set: str
    panel: Callable[[], Panel]


def worst(errors: Sequence[Error], panels: int = PANELS) -> list[Error]:
    """The worst of all sets together, but of each set no more than its share of the page while others have some."""
    ranked = sorted((e for e in errors if e.badness > 0), key=lambda e: -e.badness)
    share = -(-panels // max(len({e.set for e in ranked}), 1))
    first = [e for e in ranked if sum(o.set == e.set for o in ranked[: ranked.index(e)]) < share]
    chosen = (first + [e for e in ranked if e not in first])[:panels]
    return sorted(chosen, key=lambda e: -e.badness)


def worst_corner(wrong: np.ndarray, side: int) -> tuple[Corner, float]:
    """Where a window of `side` pixels holds most of `wrong` (float [H, W]): its corner (x, y), and how much."""
    h, w = wrong.shape
    sums = np.zeros((h + 1, w + 1))
    np.cumsum(np.cumsum(wrong, 0), 1, out=sums[1:, 1:])
    held = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(int(held.argmax()), held.shape)
    return (int(x), int(y)), float(held[y, x])


# --- boxes -----------------------------------------------------------------------------------------------------------


def box_errors(model: Model, record: Record) -> Iterator[Error]:
    """For each label of an image the window with most boxes missed or invented."""
    if len(record.images) != 1:
        return
    labels = sorted({o.label for o in record.objects})
    image = load_image(record.images[0])
    queries = [Query("ground", image, words_for(n), gsd_m=record.gsd_m, modality=modality(record)) for n in labels]
    for label, answer in zip(labels, look(model, queries, TileObjects) if labels else [], strict=True):
        boxes, scores, keep = as_arrays(answer)
        given, truth = boxes[keep], true_boxes(record, label)
        _, hits = match_boxes(ImageBoxes(given, scores[keep], truth), 0.5, len(given))
        given = given[np.argsort(-scores[keep], kind="mergesort")]
        missed = _unmatched(given[hits], truth)
        side = min(LOOK, record.width, record.height)
        corner, count = worst_corner(_centres(np.concatenate((missed, given[~hits])), record), side)
        drawn = ((truth[~_among(truth, missed)], HIT), (missed, MISSED), (given[~hits], INVENTED))
        lines = (
            f"{words_for(label)} ({record.id})",
            f"whole image: {len(truth) - len(missed)} of {len(truth)} found, {int((~hits).sum())} invented",
        )
        picture = partial(_with_boxes, image, corner, side, drawn)
        yield Error(count, record.set, lambda draw=picture, said=lines: Panel((draw(),), said))


def _unmatched(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """True boxes that no found box takes at IoU 0.5."""
    free = list(range(len(truth)))
    for box in found:
        _, hit = match_boxes(ImageBoxes(truth[free], np.ones(len(free)), box[None]), 0.5, len(free))
        if hit.any():
            free.pop(int(hit.argmax()))
    return truth[free].reshape(-1, 4)


def _among(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.array([any((box == other).all() for other in others) for box in boxes], bool)


def _centres(boxes: np.ndarray, record: Record) -> np.ndarray:
    wrong = np.zeros((record.height, record.width))
    for x1, y1, x2, y2 in boxes:
        x, y = int(min((x1 + x2) / 2, record.width - 1)), int(min((y1 + y2) / 2, record.height - 1))
        wrong[max(y, 0), max(x, 0)] += 1
    return wrong


def _with_boxes(image: np.ndarray, corner: Corner, side: int,
                drawn: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:  # fmt: skip
    x, y = corner
    picture = Image.fromarray(reduced(image[y : y + side, x : x + side]))
    pen = ImageDraw.Draw(picture)
    for boxes, colour in drawn:
        for box in (boxes - [x, y, x, y]) * (SIDE / side):
            pen.rectangle(tuple(box.tolist()), outline=colour, width=2)
    return np.asarray(picture)


# --- masks and change ------------------------------------------------------------------------------------------------


def mask_errors(model: Model, record: Record) -> Iterator[Error]:
    """The windows of each class in which most pixels are wrong, two of an image."""
    if record.mask is None:
        return
    labels = mask_values(record)
    for _, found in outline(model, [record], lambda _: [words_for(n) for n in labels], f"{record.set} masks"):
        image, values = load_image(record.images[0]), load_mask(record.mask)
        for label, value in labels.items():
            said = f"{words_for(label)} ({record.id})"
            yield from _pixel_errors(record, (image,), found[words_for(label)], values == value, said)


def change_errors(model: Model, record: Record) -> Iterator[Error]:
    """The windows of a pair in which most pixels are wrong, two of a pair."""
    if record.change_mask is None or len(record.images) != 2:
        return
    before, after = (load_image(path) for path in record.images)
    found, truth = changed(model, record, before, after), load_mask(record.change_mask) > 127
    yield from _pixel_errors(record, (before, after), found, truth, f"change ({record.id})")


def _pixel_errors(record: Record, images: tuple[np.ndarray, ...], found: np.ndarray, truth: np.ndarray,
                  said: str) -> Iterator[Error]:  # fmt: skip
    side, wrong = min(LOOK, record.width, record.height), (found != truth).astype(float)
    for _ in range(2):
        (x, y), count = worst_corner(wrong, side)
        here = slice(y, y + side), slice(x, x + side)
        wrong[here] = 0
        views, f, t = tuple(image[here] for image in images), found[here], truth[here]
        lines = (said, f"of these pixels {t.mean():.0%} labelled, {(t & ~f).mean():.0%} missed, "
                 f"{(f & ~t).mean():.0%} invented")  # fmt: skip
        yield Error(
            count / side**2, record.set,
            lambda v=views, f=f, t=t, s=lines: Panel((*map(reduced, v), _with_masks(v[-1], f, t)), s),
        )  # fmt: skip


def _with_masks(image: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    out = image.mean(2, keepdims=True).repeat(3, 2) * 0.7
    out[found & truth] = 0.4 * out[found & truth] + 0.6 * 255
    plain = Image.fromarray(reduced(out.round().astype(np.uint8)))
    for where, colour in ((truth & ~found, MISSED), (found & ~truth, INVENTED)):
        plain.paste(colour, mask=Image.fromarray(where).resize(plain.size))
    return np.asarray(plain)


# --- words -----------------------------------------------------------------------------------------------------------


def caption_errors(model: Model, records: Sequence[Record]) -> list[Error]:
    """The captions furthest from their references by CIDEr-D, one of a scene class."""
    captioned = [record for record in records if record.captions]
    queries = (Query("caption", load_image(record.images[0])) for record in captioned)
    said = ask(model, queries, len(captioned), TileCaption, "captions") if captioned else []
    references = [[tokenize(text) for text in record.captions] for record in captioned]
    scorer = Cider(references) if references else None
    worst_of: dict[str | None, tuple[float, Error]] = {}
    for record, answer, texts in zip(captioned, said, references, strict=True):
        assert scorer is not None
        value = float(scorer.similarity([tokenize(answer.caption)], texts).mean())
        if record.scene in worst_of and worst_of[record.scene][0] <= value:
            continue
        lines = (f"said: {answer.caption}", f"reference: {record.captions[0]}", f"CIDEr {value:.2f} ({record.id})")
        worst_of[record.scene] = value, Error(10 - value, record.set, _whole(record, lines))
    return [error for _, error in worst_of.values()]


def answer_errors(model: Model, records: Sequence[Record]) -> list[Error]:
    """The wrong answers that the model was surest of, one of an image; wrong scenes of a set's list among them."""
    asked = [(record, qa) for record in records for qa in record.qa]
    queries = (Query("vqa", image, qa.question) for record, qa, image in _with_images(asked))
    answers = ask(model, queries, len(asked), TileVqa, "answers") if asked else []
    wrong = [
        (a.confidence, r, f"{qa.question.rstrip('?')}?", a.answer, qa.answer)
        for (r, qa), a in zip(asked, answers, strict=True)
        if not a.abstained and normalise(a.answer) != normalise(qa.answer)
    ]
    labelled = [record for record in records if record.scene]
    pairs = sorted({(record.set, readable(record.scene or "")) for record in labelled})
    lists = {name: tuple(scene for of, scene in pairs if of == name) for name, _ in pairs}
    scenes = (Query("classify", load_image(r.images[0]), labels=lists[r.set]) for r in labelled)
    for record, answer in zip(labelled, ask(model, scenes, len(labelled), TileClasses, "scenes"), strict=True):
        best, truth = int(np.argmax(answer.scores)), readable(record.scene or "")
        if answer.labels[best] != truth:
            wrong.append((answer.scores[best], record, "Scene class?", answer.labels[best], truth))
    worst_of: dict[str, Error] = {}
    for sure, record, question, said, truth in sorted(wrong, key=lambda w: -w[0]):
        lines = (question, f"said: {said}, {sure:.0%} sure", f"label: {truth} ({record.id})")
        worst_of.setdefault(record.id, Error(sure, record.set, _whole(record, lines)))
    return list(worst_of.values())


def _whole(record: Record, lines: tuple[str, ...]) -> Callable[[], Panel]:
    return lambda: Panel((reduced(load_image(record.images[0])),), lines)


def _with_images(asked: Sequence[tuple[Record, QA]]) -> Iterator[tuple[Record, QA, np.ndarray]]:
    """Each image decoded once for its questions, which stand one after another."""
    last: tuple[str, np.ndarray] | None = None
    for record, qa in asked:
        if last is None or last[0] != record.id:
            last = record.id, load_image(record.images[0])
        yield record, qa, last[1]


# --- pages -----------------------------------------------------------------------------------------------------------

Collect = Callable[[Model, list[Record]], list[Error]]


def _each(errors: Callable[[Model, Record], Iterator[Error]]) -> Collect:
    return lambda model, records: [error for record in records for error in errors(model, record)]


PAGES: dict[str, tuple[str, tuple[tuple[str, str], ...], str, Collect]] = {
    "boxes": (
        "Boxes: most missed or invented", (("found", HIT), *LEGEND),
        "Picked: of every image and label the window with most boxes that are missed or invented at IoU 0.5.",
        _each(box_errors),
    ),
    "masks": (
        "Masks: most pixels wrong", (("right (light)", HIT), *LEGEND),
        "Picked: of every image the two windows with most wrong pixels.", _each(mask_errors),
    ),
    "change": (
        "Change: most pixels wrong (before, after, what was found)", (("right (light)", HIT), *LEGEND),
        "Picked: of every pair the two windows with most wrong pixels.", _each(change_errors),
    ),
    "captions": (
        "Captions: furthest from their references", (),
        "Picked: the lowest CIDEr-D, one of a scene class.", caption_errors,
    ),
    "answers": (
        "Answers: surest of what is wrong", (),
        "Picked: wrong answers and scenes by confidence, one of an image.", answer_errors,
    ),
}  # fmt: skip


def run(model: Model, data: Path, split: str, out: Path, limit: int | None = None) -> list[Path]:
    """Draw a page for every kind of error that there is; the pages written. `limit`: images of each set."""
    sets = [name for name in CREDITS if name in set_names(data)]
    records = [record for name in sets for record in read_records(data, [name], split)[:limit]]
    written = []
    for name, (title, legend, rule, collect) in PAGES.items():
        try:
            chosen = worst(collect(model, records))
        except TaskNotServed as error:
            typer.echo(f"no {name}: {error}", err=True)
            continue
        if not chosen:
            typer.echo(f"no {name}: nothing of the kind is wrong, or nothing labelled, in split {split!r}", err=True)
            continue
        panels = tuple(error.panel() for error in chosen)
        credit = "; ".join(CREDITS[name] for name in sets if any(error.set == name for error in chosen))
        whose = f"Model {model.info.model}, weights {model.info.weights_digest}, split {split}. Excerpts, reduced"
        path = out / f"failures_{name}.png"
        draw(Page(title, panels, (f"{rule} {whose}, for research. {credit}.",), legend), path)
        written.append(path)
    return written


def gallery_section(folder: Path) -> list[str]:
    """The pages as a section of the page of results, where they have been drawn into the same folder."""
    there = [name for name in PAGES if (folder / f"failures_{name}.png").is_file()]
    if not there:
        return []
    lines = ["", "## Worst errors", "",
             "Picked by measure from validation images whose terms let an excerpt be shown; the other sets are left "
             "out (`python -m model_server.evaluation.gallery DATA_DIR --out docs`)."]  # fmt: skip
    for name in there:
        lines += ["", f"![{PAGES[name][0]}](failures_{name}.png)"]
    return lines


@app.command()
def main(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder for the pages")],
    split: Split = "val",
    weights: Weights = DEFAULT_WEIGHTS,
    limit: Annotated[int | None, typer.Option(help="only this many images of each set", min=1)] = None,
) -> None:
    """Draw the pages, name them."""
    held(data, CREDITS)
    for path in run(Perceiver.load(weights), data, split, out, limit):
        typer.echo(f"{path}, {path.stat().st_size / 1000:.0f} kB")
    put(out, gallery_section(out))


if __name__ == "__main__":
    app()
