"""Captions against their references (protocol `coco`), beside a constant, a blind and a look-up control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from model_server.evaluation.asking import Model, ask, mean_colour
from model_server.evaluation.caption_metrics import Cider, Tokens, bleu, cider, rouge_l, tokenize
from model_server.evaluation.dataset import EvaluatedSet, evenly
from model_server.evaluation.neighbours import NEIGHBOURS, caption_bank, consensus_captions, image_features
from model_server.evaluation.results import Results, Row
from model_server.perceiver import Query
from model_server.protocol import TileCaption
from model_server.training.records import Record, load_image

_CANDIDATES = 400  # captions tried as the constant one
_SAMPLE = 300  # training images they are tried on


def evaluate_captions(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the caption rows of one set: `bleu1` .. `bleu4`, `rouge_l`, `cider`."""
    records = [record for record in data.records if record.captions]
    if not records:
        results.notes.append(f"{data.name}: no captions in split {data.split!r}, so no caption row")
        return
    references = [[tokenize(text) for text in record.captions] for record in records]
    title = f"{data.name} captions"
    ours = scores(_captions(model, records, title, blind=False), references)
    controls: dict[str, dict[str, float]] = {
        "blind": scores(_captions(model, records, f"{title}, blind", blind=True), references)
    }
    bank_records = [record for record in data.train if record.captions]
    if bank_records:
        constant = best_constant([[tokenize(text) for text in record.captions] for record in bank_records])
        controls["constant"] = scores([constant] * len(records), references)
        cache = data.cache / f"neighbours-{data.name}-{model.info.weights_digest.removeprefix('sha256:')[:16]}.npz"
        bank = caption_bank(image_features(model, bank_records, cache, f"{data.name} training images"), bank_records)
        queries = image_features(model, records, None, f"{data.name} image features")
        controls[f"neighbours{NEIGHBOURS}"] = scores(consensus_captions(queries, bank), references)
    else:
        results.notes.append(f"{data.name}: no captions to train on, so no constant and no neighbour control")
    names = ("constant", "blind", f"neighbours{NEIGHBOURS}")
    for metric, value in ours.items():
        beside = {name: controls[name][metric] if name in controls else None for name in names}
        results.rows.append(Row(data.name, data.split, "caption", "coco", metric, value, len(records), beside))


def scores(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """The measures of protocol `coco` by name. METEOR is not among them: it needs Java."""
    by_order = {f"bleu{n}": value for n, value in enumerate(bleu(captions, references), start=1)}
    return by_order | {"rouge_l": rouge_l(captions, references), "cider": cider(captions, references)}


def best_constant(documents: Sequence[Sequence[Tokens]]) -> Tokens:
    """The training caption that, said of every training image, has the highest CIDEr.

    Tried are the commonest captions and an even sample of the others, on an even sample of the images. The evaluated
    split has no say in the choice.
    """
    common = [text for text, _ in Counter(chain.from_iterable(documents)).most_common()]
    half = _CANDIDATES // 2
    candidates = common[:half] + evenly(common[half:], half)
    sample = evenly(documents, _SAMPLE)
    texts = list(dict.fromkeys(chain.from_iterable(sample)))
    place = {text: column for column, text in enumerate(texts)}
    shares = np.zeros(len(texts))
    for captions in sample:
        for text in captions:
            shares[place[text]] += 1 / len(captions)
    return candidates[int((Cider(documents).similarity(candidates, texts) @ shares).argmax())]


def _captions(model: Model, records: Sequence[Record], title: str, blind: bool) -> list[Tokens]:
    answers = ask(model, _queries(records, blind), len(records), TileCaption, title)
    return [tokenize(answer.caption) for answer in answers]


def _queries(records: Sequence[Record], blind: bool) -> Iterable[Query]:
    for record in records:
        image = load_image(record.images[0])
        yield Query("caption", mean_colour(image) if blind else image)
