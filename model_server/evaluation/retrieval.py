"""Images found by their captions and captions by their images (protocol `recall`), through the contrastive head."""

from __future__ import annotations

from math import comb

import numpy as np

from model_server.evaluation.asking import BATCH, Model, progress
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.results import Results, Row
from model_server.training.records import load_image

RANKS = (1, 5, 10)


def evaluate_retrieval(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the retrieval rows of one captioned set: Recall@1, 5 and 10 both ways, and their means.

    By `recall` only an image's own captions are right; by `recall/same-text` so is the same sentence said of another
    image, which in sets with often repeated captions no model could tell apart.
    """
    records = [record for record in data.records if record.captions]
    if not records:
        results.notes.append(f"{data.name}: no captions in split {data.split!r}, so no retrieval row")
        return
    captions = [list(dict.fromkeys(record.captions)) for record in records]
    texts = [text for said in captions for text in said]
    chunks = [records[i : i + BATCH] for i in range(0, len(records), BATCH)]
    images = np.concatenate(
        [
            model.image_vectors([load_image(record.images[0]) for record in chunk])
            for chunk in progress(chunks, f"{data.name} retrieval, images", len(chunks))
        ]
    )
    parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    sentences = [
        model.text_vectors(part) for part in progress(parts, f"{data.name} retrieval, captions", len(parts))
    ]
    similarity = np.concatenate(sentences) @ images.T  # [texts, images]
    owner = np.repeat(np.arange(len(records)), [len(said) for said in captions])
    own = owner[:, None] == np.arange(len(records))[None]
    said_of = {text: np.zeros(len(records), bool) for text in texts}
    for text, row in zip(texts, own, strict=True):
        said_of[text] |= row
    same = np.stack([said_of[text] for text in texts])
    for protocol, right in (("recall", own), ("recall/same-text", same)):
        results.rows += _rows(data, protocol, similarity, right)


def expected_recall(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of queries with a right candidate among their best `k`, ties broken at random: the expectation.

    `similarity` [Q, C], `right` bool [Q, C] with at least one True in each row.
    """
    return float(np.mean([_chance_of_hit(s, r, k) for s, r in zip(similarity, right, strict=True)]))


def _chance_of_hit(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    best = similarity[right].max()
    slots = k - int((similarity > best).sum())  # left for those that tie with the best right one
    tied = similarity == best
    wrong = int((tied & ~right).sum())
    if slots <= 0:
        return 0.0
    return 1 - comb(wrong, slots) / comb(int(tied.sum()), slots) if slots <= wrong else 1.0


def _rows(data: EvaluatedSet, protocol: str, similarity: np.ndarray, right: np.ndarray) -> list[Row]:
    ways = {"text_to_image": (similarity, right), "image_to_text": (similarity.T, right.T)}
    values = {f"r{k}/{way}": expected_recall(s, r, k) for way, (s, r) in ways.items() for k in RANKS}
    chance = {f"r{k}/{way}": expected_recall(np.zeros_like(s), r, k) for way, (s, r) in ways.items() for k in RANKS}
    counts = {way: len(s) for way, (s, _) in ways.items()}
    for figures in (values, chance):
        for k in RANKS:
            figures[f"r{k}"] = float(np.mean([figures[f"r{k}/{way}"] for way in ways]))
        figures["mean_recall"] = float(np.mean([figures[f"r{k}"] for k in RANKS]))
    order = [f"r{k}" for k in RANKS] + ["mean_recall"] + [f"r{k}/{way}" for way in ways for k in RANKS]
    return [
        Row(data.name, data.split, "retrieve", protocol, metric, values[metric],
            counts.get(metric.partition("/")[2], sum(counts.values())), {"chance": chance[metric]})
        for metric in order
    ]  # fmt: skip
