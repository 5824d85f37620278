"""BLEU, ROUGE-L and CIDEr-D of captions, equal to `pycocoevalcap` (a test compares them) without its dependencies.

The tokenizer is ours, because the usual one needs Java: lower-case, every character that is neither letter, digit nor
white space becomes a space, split at spaces. It agrees with the usual one on plain sentences and differs on
contractions and hyphens ("built-up" is two words here, one there).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_server.text.agreement import ORDERS, Gram, Tokens, grams, tokenize

__all__ = ["Cider", "Tokens", "bleu", "cider", "rouge_l", "tokenize"]

_SIGMA = 6.0  # of CIDEr-D's penalty on a difference of lengths
_BETA = 1.2  # ROUGE-L's weight of recall against precision


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, float, float, float]:
    """Corpus BLEU-1..4 with the closest reference length (the shorter of two equally close)."""
    guessed, correct = [0] * ORDERS, [0] * ORDERS
    length, reference_length = 0, 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(text) - len(hypothesis)), len(text)) for text in texts)[1]
        most: Counter[Gram] = Counter()
        for text in texts:
            most |= grams(text)
        for gram, count in grams(hypothesis).items():
            correct[len(gram) - 1] += min(count, most[gram])
        for n in range(ORDERS):
            guessed[n] += max(0, len(hypothesis) - n)
    tiny, small = 1e-15, 1e-9  # as pycocoevalcap keeps the logarithm finite
    scores, product = [], 1.0
    ratio = (length + tiny) / (reference_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(ORDERS):
        product *= (correct[n] + tiny) / (guessed[n] + small)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores[0], scores[1], scores[2], scores[3]


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean ROUGE-L: best precision and best recall of the longest common subsequence, over the references."""
    scores = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        common = [_common_subsequence(hypothesis, text) for text in texts]
        precision = max(c / max(len(hypothesis), 1) for c in common)
        recall = max(c / max(len(text), 1) for c, text in zip(common, texts, strict=True))
        denominator = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / denominator if denominator else 0.0)
    return float(np.mean(scores))


def cider(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean CIDEr-D, in its own unit (0 to 10), with the document frequencies of these references."""
    scorer = Cider(references)
    pairs = zip(hypotheses, references, strict=True)
    return float(np.mean([scorer.similarity([hypothesis], texts).mean() for hypothesis, texts in pairs]))


@dataclass(frozen=True)
class _Vector:
    """One sentence: ids of its n-grams, their counts, the tf-idf norm of each order, and its length in bigrams."""

    ids: np.ndarray  # int64 [grams], sorted
    counts: np.ndarray  # float64 [grams]
    norms: np.ndarray  # float64 [4]
    length: int


class Cider:
    """CIDEr-D between any sentences, with document frequencies counted over images.

    Args:
        documents: the captions of each image; an n-gram counts once for every image that has it.
    """

    def __init__(self, documents: Sequence[Sequence[Tokens]]) -> None:
        frequency: Counter[Gram] = Counter()
        for texts in documents:
            frequency.update({gram for text in texts for gram in grams(text)})
        self._log_documents = math.log(len(documents))
        self._ids: dict[Gram, int] = {}
        self._orders: list[int] = []
        self._idf: list[float] = []
        for gram, count in frequency.items():
            self._add(gram, count)
        self._vectors: dict[Tokens, _Vector] = {}

    def similarity(self, hypotheses: Sequence[Tokens], references: Sequence[Tokens]) -> np.ndarray:
        """CIDEr-D of every hypothesis against every single reference: float64 [hypotheses, references]."""
        left = [self._vector(tokens) for tokens in hypotheses]
        right = left if references is hypotheses else [self._vector(tokens) for tokens in references]
        shared = np.intersect1d(np.concatenate([v.ids for v in left]), np.concatenate([v.ids for v in right]))
        orders = np.array([self._orders[i] for i in shared], dtype=np.int64)
        weight = np.array([self._idf[i] for i in shared]) ** 2
        a, b = _dense(left, shared), _dense(right, shared)  # [sentences, shared n-grams]
        total = np.zeros((len(left), len(right)))
        for n in range(ORDERS):
            columns = orders == n
            x, y = a[:, columns], b[:, columns]
            # min(h, r) * r, summed over n-grams: min(h, r) is the number of levels k that both counts reach.
            dot = np.zeros_like(total)
            for k in range(1, int(min(x.max(initial=0), y.max(initial=0))) + 1):
                dot += ((x >= k) * weight[columns]) @ ((y >= k) * y).T
            norms = np.outer([v.norms[n] for v in left], [v.norms[n] for v in right])
            total += np.divide(dot, norms, out=dot, where=norms != 0)
        lengths = np.subtract.outer([v.length for v in left], [v.length for v in right])
        return total / ORDERS * np.exp(-(lengths**2) / (2 * _SIGMA**2)) * 10

    def _add(self, gram: Gram, documents: int) -> int:
        self._orders.append(len(gram) - 1)
        self._idf.append(self._log_documents - math.log(max(documents, 1)))
        return self._ids.setdefault(gram, len(self._ids))

    def _vector(self, tokens: Tokens) -> _Vector:
        known = self._vectors.get(tokens)
        if known is not None:
            return known
        counted = grams(tokens)
        found = sorted((self._ids[g] if g in self._ids else self._add(g, 0), count) for g, count in counted.items())
        squares = np.zeros(ORDERS)
        for i, count in found:
            squares[self._orders[i]] += (count * self._idf[i]) ** 2
        ids = np.array([i for i, _ in found], dtype=np.int64)
        counts = np.array([count for _, count in found], dtype=np.float64)
        vector = _Vector(ids, counts, np.sqrt(squares), max(len(tokens) - 1, 0))
        self._vectors[tokens] = vector
        return vector


def _dense(vectors: Sequence[_Vector], columns: np.ndarray) -> np.ndarray:
    table = np.zeros((len(vectors), len(columns)))
    if len(columns):
        for row, vector in zip(table, vectors, strict=True):
            at = np.minimum(np.searchsorted(columns, vector.ids), len(columns) - 1)
            kept = columns[at] == vector.ids
            row[at[kept]] = vector.counts[kept]
    return table


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
