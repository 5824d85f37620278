"""Serving in half precision, and with weights in eight bits: what is answered beside float32, what is kept in memory,
and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from model_server.model.dense import box_iou
from model_server.model.packed import can_pack
from model_server.opening import open_weights
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query
from model_server.precision import Precision, UnknownPrecision, serving_dtype
from model_server.protocol import TileAnswer, TileCaption, TileChange, TileClasses, TileMasks, TileObjects, TileVqa

SCENES = Path(__file__).parents[1] / "examples" / "data"
CONFIDENCE = 0.03  # how far a score of half precision may lie from its float32
TOGETHER = 0.02  # and one that was given in another batch
OVERLAP = 0.75  # of boxes: each is a mean of its neighbours, of whom one more or less may count
FOUND = 0.8  # of the objects above the threshold
SHARE = 0.01  # of the pixels may lie on the other side of a mask's threshold,
NEAR = 0.1  # and they are none whose float32 probability is so far from it


def scene(name: str) -> np.ndarray:
    with Image.open(SCENES / name) as file:
        return np.asarray(file.convert("RGB"))


def of_all_tasks(image: np.ndarray) -> list[Query]:
    corner = image[:256, :256]
    return [
        Query("caption", image), Query("vqa", image, text="Are there any trees?"),
        Query("vqa", image, text="Is there a ship?"), Query("classify", image),
        Query("ground", corner, text="tree", gsd_m=0.1),  # unknown, a look at another scale may win by a hair
        Query("segment", corner, labels=("water", "tree")), Query("detect_change", corner, after=corner[::-1].copy()),
    ]  # fmt: skip


def assert_close(answer: TileAnswer, expected: TileAnswer, tolerance: float) -> None:
    """The same words, class, boxes and masks but for pixels near a threshold; scores within the tolerance."""
    assert type(answer) is type(expected)
    if isinstance(answer, TileCaption) and isinstance(expected, TileCaption):
        assert answer.caption == expected.caption
        assert answer.confidence == pytest.approx(expected.confidence, abs=tolerance)
    elif isinstance(answer, TileVqa) and isinstance(expected, TileVqa):
        assert answer.answer == expected.answer
        assert answer.confidence == pytest.approx(expected.confidence, abs=tolerance)
    elif isinstance(answer, TileClasses) and isinstance(expected, TileClasses):
        assert np.argmax(answer.scores) == np.argmax(expected.scores)
        np.testing.assert_allclose(answer.scores, expected.scores, atol=tolerance)
    elif isinstance(answer, TileObjects) and isinstance(expected, TileObjects):
        assert_found(answer, expected, tolerance)
    elif isinstance(answer, TileMasks) and isinstance(expected, TileMasks):
        assert answer.labels == expected.labels
        for mask, other, threshold in zip(
            answer.probabilities, expected.probabilities, expected.thresholds, strict=True
        ):
            assert_same_pixels(mask, other, threshold)
    else:
        assert isinstance(answer, TileChange)
        assert isinstance(expected, TileChange)
        assert_same_pixels(answer.probabilities, expected.probabilities, expected.threshold)


def assert_found(answer: TileObjects, expected: TileObjects, tolerance: float) -> None:
    """Most objects above the threshold are there with their scores: of two crowns that touch, either may win."""
    clear = [i for i, score in enumerate(expected.scores) if score >= expected.threshold]
    overlap = box_iou(torch.tensor(expected.boxes).view(-1, 4), torch.tensor(answer.boxes).view(-1, 4)) >= OVERLAP
    alike = (torch.tensor(expected.scores)[:, None] - torch.tensor(answer.scores)).abs() <= tolerance
    found = (overlap & alike).any(1)[clear]
    assert found.sum() >= FOUND * len(clear), (found.tolist(), len(clear))


def assert_same_pixels(mask: np.ndarray, other: np.ndarray, threshold: float) -> None:
    changed = (mask >= 255 * threshold) != (other >= 255 * threshold)
    assert changed.mean() <= SHARE
    assert not changed[np.abs(other / 255 - threshold) > NEAR].any()


@pytest.fixture(scope="module")
def half() -> Perceiver:
    return Perceiver.load(DEFAULT_WEIGHTS, precision="bfloat16")


@pytest.fixture(scope="module")
def exact() -> Perceiver:
    return Perceiver.load(DEFAULT_WEIGHTS, precision="float32")


@pytest.fixture(scope="module")
def small() -> Perceiver:
    return Perceiver.load(DEFAULT_WEIGHTS, precision="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_all_six_tasks_answer_on_a_gpu_as_on_a_processor_in_float32(exact: Perceiver, precision: str) -> None:
    gpu = Perceiver.load(DEFAULT_WEIGHTS, "cuda", precision)
    queries = of_all_tasks(scene("ordway_swisher_neon.tif"))
    for answer, expected in zip(gpu.answer(queries), exact.answer(queries), strict=True):
        assert_close(answer, expected, CONFIDENCE)


class TestEightBits:
    def test_answers_in_words_are_those_of_float32(self, small: Perceiver, exact: Perceiver) -> None:
        queries = of_all_tasks(scene("ordway_swisher_neon.tif"))[:4] + of_all_tasks(scene("yellowstone_road.jpg"))[1:4]
        for answer, expected in zip(small.answer(queries), exact.answer(queries), strict=True):
            assert_close(answer, expected, CONFIDENCE)

    def test_weights_take_less_memory_than_in_half_precision_and_the_server_says_so(
        self, small: Perceiver, half: Perceiver
    ) -> None:
        assert small.info.precision == "int8"
        assert small.info.weights_digest == half.info.weights_digest
        assert small.plan.slots == half.plan.slots
        assert small.plan.weights < half.plan.weights - 3 * 2**20


class TestShippedWeights:
    @pytest.mark.parametrize("name", ["ordway_swisher_neon.tif", "yellowstone_road.jpg"])
    def test_all_six_tasks_answer_as_in_float32(self, half: Perceiver, exact: Perceiver, name: str) -> None:
        queries = of_all_tasks(scene(name))
        for answer, expected in zip(half.answer(queries), exact.answer(queries), strict=True):
            assert_close(answer, expected, CONFIDENCE)

    def test_answers_given_together_are_those_given_alone(self, half: Perceiver) -> None:
        queries = of_all_tasks(scene("ordway_swisher_neon.tif"))[:4] + of_all_tasks(scene("yellowstone_road.jpg"))
        half.free_memory()
        together = half.answer(queries)
        for query, answer in zip(queries, together, strict=True):
            half.free_memory()
            assert_close(half.answer([query])[0], answer, TOGETHER)

    def test_weights_and_keys_take_less_memory_and_the_server_says_what_it_computes_in(
        self, half: Perceiver, exact: Perceiver
    ) -> None:
        assert (half.info.precision, exact.info.precision) == ("bfloat16", "float32")
        assert half.info.weights_digest == exact.info.weights_digest
        assert half.plan.sequences == exact.plan.sequences
        assert 2 * half.plan.slots == exact.plan.slots
        assert half.plan.weights < exact.plan.weights

    def test_what_answers_are_read_off_stays_in_float32(self, half: Perceiver) -> None:
        images = half.image_vectors([scene("yellowstone_road.jpg")])
        texts = half.text_vectors(["a road"])
        assert images.dtype == texts.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm([images[0], texts[0]], axis=1), 1, atol=1e-6)


def test_half_precision_also_answers_where_nothing_can_be_packed(
    dense_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = Perceiver.load(dense_weights, precision="bfloat16")
    monkeypatch.setattr("model_server.serving_form.can_pack", lambda *_: False)
    plain = Perceiver.load(dense_weights, precision="bfloat16")
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for perceiver in (packed, plain):
        perceiver.warm_up()
    queries = [Query("classify", image), Query("ground", image, text="ship"), Query("segment", image, labels=("sea",))]
    for answer, expected in zip(plain.answer(queries), packed.answer(queries), strict=True):
        assert_close(answer, expected, CONFIDENCE)


@pytest.mark.parametrize(
    ("family", "quick"),
    [("rsunivlm", {"max_position_embeddings": 256}), ("mfrsvlm", {"deepstack_window_scales": [1.0]})],
)
def test_a_published_model_is_served_in_half_precision_without_a_gpu(
    spoken: Callable[..., Path], family: str, quick: dict[str, object]
) -> None:
    model = open_weights(str(spoken(family, **quick)), "cpu", "bfloat16")
    model.warm_up()
    assert model.info.precision == "bfloat16"


@pytest.mark.parametrize("family", ["rsunivlm", "mfrsvlm"])
def test_a_published_decoder_is_served_with_weights_in_eight_bits(spoken: Callable[..., Path], family: str) -> None:
    quick = {"max_position_embeddings": 256} if family == "rsunivlm" else {"deepstack_window_scales": [1.0]}
    model = open_weights(str(spoken(family, **quick)), "cpu", "int8")
    model.warm_up()
    assert model.info.precision == "int8"


def test_where_nothing_can_be_packed_all_six_tasks_answer_the_same(
    exact: Perceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_server.serving_form.can_pack", lambda *_: False)
    plain = Perceiver.load(DEFAULT_WEIGHTS, precision="float32")
    assert not any(type(m).__name__.startswith("Packed") for m in plain.model.modules())
    queries = of_all_tasks(scene("ordway_swisher_neon.tif"))
    for answer, expected in zip(plain.answer(queries), exact.answer(queries), strict=True):
        assert_close(answer, expected, 0.001)


def test_half_precision_is_packed_only_where_the_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not can_pack(torch.device("cpu"), torch.bfloat16)


def test_left_to_itself_a_processor_computes_in_float32(debug_weights: Path) -> None:
    assert serving_dtype("auto", torch.device("cpu")) is torch.float32
    assert Perceiver.load(debug_weights).info.precision == "float32"


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_left_to_itself_a_gpu_computes_in_bfloat16_where_it_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert serving_dtype(Precision.AUTO, torch.device("cuda")) is dtype
    assert serving_dtype(Precision.FLOAT32, torch.device("cuda")) is torch.float32


def test_an_unknown_precision_is_refused_with_those_there_are(debug_weights: Path) -> None:
    with pytest.raises(UnknownPrecision, match="'int4'; a model is served in one of auto, float32, bfloat16, int8"):
        open_weights(str(debug_weights), "cpu", "int4")


def test_the_command_refuses_an_unknown_precision_before_it_listens() -> None:
    import typer

    from model_server.app import command

    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(app, ["--precision", "int4"])
    assert told.exit_code == 2
    assert "bfloat16" in told.output
    assert "url" not in told.output
