"""Which of several candidate sentences the others agree with most: minimum Bayes risk (Kumar & Byrne 2004).

The likeliest sentence may stand alone where many less likely ones say nearly the same; the one nearest to all of them
is a safer thing to say.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Tokens = tuple[str, ...]
Gram = tuple[str, ...]

ORDERS = 4
_TEMPERATURE = 4.0  # beams are alike, and their probabilities surer than they should be


def tokenize(text: str) -> Tokens:
    """Words of a caption in lower case, without punctuation."""
    return tuple(re.sub(r"[\W_]+", " ", text.lower()).split())


def grams(tokens: Tokens) -> Counter[Gram]:
    """Counts of all n-grams of 1 to 4 words."""
    return Counter(tokens[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def most_agreed(sentences: Sequence[str], logprobs: Sequence[float]) -> int:
    """Index of the sentence with the highest expected BLEU-1 + .. + BLEU-4 against all, by their probabilities."""
    counted = [grams(tokenize(text)) for text in sentences]
    best = max(logprobs)
    weights = [math.exp((p - best) / _TEMPERATURE) for p in logprobs]
    worth = [sum(w * _bleu(a, b) for b, w in zip(counted, weights, strict=True)) for a in counted]
    return max(range(len(worth)), key=worth.__getitem__)


def _bleu(said: Counter[Gram], reference: Counter[Gram]) -> float:
    """BLEU-1 + .. + BLEU-4 of one sentence against one other, without smoothing."""
    total, right = [0] * ORDERS, [0] * ORDERS
    for gram, count in said.items():
        total[len(gram) - 1] += count
        right[len(gram) - 1] += min(count, reference[gram])
    length = sum(count for gram, count in reference.items() if len(gram) == 1)
    if not total[0]:
        return 0.0
    penalty = min(1.0, math.exp(1 - length / total[0]))
    score, product = 0.0, 1.0
    for n in range(ORDERS):
        if not right[n]:
            break
        product *= right[n] / total[n]
        score += penalty * product ** (1 / (n + 1))
    return score
