import math
from random import Random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.rouge.rouge import Rouge

from model_server.evaluation.caption_metrics import Cider, Tokens, bleu, cider, rouge_l, tokenize

WORDS = ["a", "river", "runs", "through", "green", "trees", "and", "many", "houses", "near", "the", "sea"]


def _corpus(seed: int, images: int = 25) -> tuple[list[Tokens], list[list[Tokens]]]:
    rng = Random(seed)

    def sentence() -> Tokens:
        return tuple(rng.choices(WORDS, k=rng.randint(3, 14)))

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    # Half of what is said comes from a reference, so that long n-grams match too.
    hypotheses = [rng.choice(texts)[: rng.randint(4, 14)] if rng.random() < 0.5 else sentence() for texts in references]
    return hypotheses, references


def _coco(hypotheses: list[Tokens], references: list[list[Tokens]]) -> tuple[dict, dict]:
    truth = {i: [" ".join(text) for text in texts] for i, texts in enumerate(references)}
    return truth, {i: [" ".join(text)] for i, text in enumerate(hypotheses)}


def test_the_tokenizer_lower_cases_and_drops_punctuation() -> None:
    assert tokenize("A river, some TREES\nand built-up land_marks .") == (
        *("a", "river", "some", "trees", "and", "built", "up", "land", "marks"),
    )
    assert tokenize(" . ") == ()


@pytest.mark.parametrize("seed", range(4))
def test_bleu_rouge_and_cider_equal_pycocoevalcap(seed: int) -> None:
    hypotheses, references = _corpus(seed)
    truth, said = _coco(hypotheses, references)
    assert bleu(hypotheses, references) == pytest.approx(Bleu(4).compute_score(truth, said, verbose=0)[0], abs=1e-9)
    assert rouge_l(hypotheses, references) == pytest.approx(Rouge().compute_score(truth, said)[0], abs=1e-9)
    assert cider(hypotheses, references) == pytest.approx(CocoCider().compute_score(truth, said)[0], abs=1e-9)


def test_an_empty_caption_scores_nothing_and_breaks_nothing() -> None:
    references = [[tokenize("a green river")], [tokenize("many houses")]]
    said: list[Tokens] = [(), tokenize("many houses")]
    assert 0 < bleu(said, references)[0] < 1
    assert rouge_l(said, references) == pytest.approx(0.5)
    # A bigram, seen in one image of two, matches itself in orders 1 and 2 only.
    assert cider(said, references) == pytest.approx(10 * 2 / 4 / 2)


def test_bleu_and_rouge_equal_what_is_worked_out_by_hand() -> None:
    said, references = [tokenize("a river and trees")], [[tokenize("a river and some green trees")]]
    penalty = math.exp(1 - 6 / 4)
    b1, b2, b3, b4 = bleu(said, references)
    assert b1 == pytest.approx(penalty)  # all 4 words match
    assert b2 == pytest.approx(penalty * math.sqrt(2 / 3))  # "a river", "river and"
    assert b3 == pytest.approx(penalty * (1 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert b4 == pytest.approx(0, abs=1e-3)
    precision, recall = 1.0, 4 / 6
    assert rouge_l(said, references) == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_cider_counts_a_repeated_word_only_as_often_as_the_reference() -> None:
    scorer = Cider([[tokenize("sea")], [tokenize("river")]])
    once, twice = scorer.similarity([("sea",), ("sea", "sea")], [("sea",)])[:, 0]
    assert once == pytest.approx(10 / 4)
    # min(2, 1) * 1 / (2 * 1), halved by the norm and lowered by the difference of one bigram in length.
    assert twice == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))


def test_pairwise_cider_does_not_depend_on_what_else_is_asked() -> None:
    hypotheses, references = _corpus(7)
    scorer = Cider(references)
    texts = [text for captions in references[:6] for text in captions]
    table = scorer.similarity(hypotheses, texts)
    alone = [[scorer.similarity([a], [b])[0, 0] for b in texts] for a in hypotheses]
    np.testing.assert_allclose(table, alone, atol=1e-12)
