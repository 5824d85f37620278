"""The control that a captioner has to beat: look up similar training images and repeat what was said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_server.evaluation.asking import BATCH, Model, progress
from model_server.evaluation.caption_metrics import Cider, Tokens, tokenize
from model_server.training.records import Record, load_image

NEIGHBOURS = 32
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Bank:
    """Captioned training images: `features` float32 [images, D] of unit rows, and the captions of each."""

    features: np.ndarray
    captions: list[list[Tokens]]


def image_features(model: Model, records: Sequence[Record], cache: Path | None, title: str) -> np.ndarray:
    """The model's unit features of the first image of each record: float32 [records, D].

    With `cache`, a `.npz` written earlier for these very records is used, and one is written otherwise. The caller puts
    the digest of the weights into its name.
    """
    ids = np.array([record.id for record in records])
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            if np.array_equal(stored["ids"], ids):
                return stored["features"]
    chunks = [records[i : i + BATCH] for i in range(0, len(records), BATCH)]
    parts = [
        model.image_features([load_image(record.images[0]) for record in chunk])
        for chunk in progress(chunks, title, len(chunks))
    ]
    features = np.concatenate(parts).astype(np.float32)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, ids=ids, features=features)
    return features


def caption_bank(features: np.ndarray, records: Sequence[Record]) -> Bank:
    """The bank of the records' captions, in the order of `features`; every record must have some."""
    return Bank(features, [[tokenize(text) for text in record.captions] for record in records])


def consensus_captions(queries: np.ndarray, bank: Bank) -> list[Tokens]:
    """For each query, float32 [queries, D] of unit rows, the caption that its nearest training images agree on best.

    Of the captions of the 32 nearest images, the one with the highest CIDEr against the captions of the *other* of
    these images: mean over each image's captions, then over images with weights exp(similarity / 0.07). Document
    frequencies come from the whole bank.
    """
    scorer = Cider(bank.captions)
    return [
        _consensus(similarity, bank, scorer)
        for similarity in progress(queries @ bank.features.T, "neighbours' captions", len(queries))
    ]


def _consensus(similarity: np.ndarray, bank: Bank, scorer: Cider) -> Tokens:
    k = min(NEIGHBOURS, len(similarity))
    nearest = np.argpartition(-similarity, k - 1)[:k]
    nearest = nearest[np.lexsort((nearest, -similarity[nearest]))]  # ties go to the earlier image, on every machine
    weights = np.exp((similarity[nearest] - similarity[nearest[0]]) / TEMPERATURE).astype(np.float64)
    texts = list(dict.fromkeys(text for i in nearest for text in bank.captions[i]))
    place = {text: column for column, text in enumerate(texts)}
    shares = np.zeros((k, len(texts)))  # [neighbours, texts]: how much of an image's captions a text makes up
    for row, i in zip(shares, nearest, strict=True):
        for text in bank.captions[i]:
            row[place[text]] += 1 / len(bank.captions[i])
    if k == 1:
        return texts[int(shares[0].argmax())]
    to_image = scorer.similarity(texts, texts) @ shares.T * weights  # [texts, neighbours]
    # A text is scored, as a caption of each image that has it, against all other images; its best case counts.
    others = (to_image.sum(axis=1, keepdims=True) - to_image) / (weights.sum() - weights)
    own = np.where(shares.T > 0, others, -np.inf)
    return texts[int(own.max(axis=1).argmax())]
