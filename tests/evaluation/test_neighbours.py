from pathlib import Path

import numpy as np
import pytest
from toy import ScriptedModel

from model_server.evaluation.caption_metrics import Cider, tokenize
from model_server.evaluation.neighbours import Bank, consensus_captions, image_features
from model_server.training.records import read_records

SEA = [tokenize(text) for text in ("waves of the blue sea", "waves of the blue sea near a beach")]
RIVER = [tokenize(text) for text in ("a river runs through trees", "a river and trees")]


def _rows(*vectors: tuple[float, float]) -> np.ndarray:
    rows = np.array(vectors, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_caption_comes_from_the_images_that_look_alike() -> None:
    bank = Bank(_rows((1, 0), (1, 0.1), (0, 1), (0.1, 1)), [[SEA[0]], [SEA[0]], [RIVER[0]], [RIVER[0]]])
    assert consensus_captions(_rows((1, 0.05), (0.05, 1)), bank) == [SEA[0], RIVER[0]]


def test_the_nearest_image_is_outvoted_when_nobody_agrees_with_it() -> None:
    odd = tokenize("something else altogether here")
    bank = Bank(_rows((1, 0), (1, 0.01), (1, 0.02), (0, 1)), [[odd], [SEA[0]], [SEA[0]], [RIVER[0]]])
    assert consensus_captions(_rows((1, 0)), bank) == [SEA[0]]


def test_the_choice_equals_the_definition_written_out() -> None:
    rng = np.random.default_rng(0)
    texts = (
        SEA + RIVER + [tokenize("trees near the blue sea"), tokenize("a beach near trees"), tokenize("a blue river")]
    )
    captions = [[texts[i] for i in rng.integers(0, len(texts), size=5)] for _ in range(60)]
    bank = Bank(_rows(*rng.normal(size=(60, 2)).tolist()), captions)
    queries = _rows(*rng.normal(size=(8, 2)).tolist())
    scorer = Cider(captions)
    for query, chosen in zip(queries, consensus_captions(queries, bank), strict=True):
        similarity = bank.features @ query
        near = np.argsort(-similarity, kind="stable")[:32]
        weight = {i: float(np.exp(similarity[i] / 0.07)) for i in near}
        scores: dict[tuple[str, ...], float] = {}
        for own in near:
            for text in captions[own]:
                others = [i for i in near if i != own]
                to = sum(weight[i] * scorer.similarity([text], captions[i]).mean() for i in others)
                scores[text] = max(scores.get(text, 0.0), to / sum(weight[i] for i in others))
        assert scores[chosen] == pytest.approx(max(scores.values()))


def test_one_training_image_is_enough() -> None:
    assert consensus_captions(_rows((1, 0)), Bank(_rows((0, 1)), [[SEA[0], RIVER[0], SEA[0]]])) == [SEA[0]]


def test_features_are_read_back_for_the_same_images(toy_data: Path, scripted: ScriptedModel, tmp_path: Path) -> None:
    records = read_records(toy_data, ["toy"], "train")
    cache = tmp_path / "features.npz"
    first = image_features(scripted, records, cache, "")
    assert first.shape == (len(records), 3)
    seen = scripted.encoded
    np.testing.assert_array_equal(image_features(scripted, records, cache, ""), first)
    assert scripted.encoded == seen
    image_features(scripted, records[:-1], cache, "")
    assert scripted.encoded == seen + len(records) - 1
