"""RSUniVLM's prompts, routing, tokens and pixels against what its authors' code was recorded to make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from model_server.families.asking import Said
from model_server.families.pictures import Processing
from model_server.families.rsunivlm import HALF, RSUniVLMDialect, expert_of, prompt
from model_server.families.words import Words
from model_server.model.config import EXPERTS, MergeConfig
from model_server.protocol import Task, TileChange, TileMasks, TileObjects
from model_server.query import Query

IMAGE = np.zeros((30, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def recorded(oracles: Path) -> Callable[[str], list[dict[str, Any]]]:
    cases = json.loads((oracles / "rsunivlm" / "text" / "text_cases.json").read_text())
    return lambda function: [case for case in cases if case["function"].startswith(function)]


def characters(start: bool) -> Words:
    """Each character is its code; with a start token 1 where asked for."""
    ids = {chr(code): code for code in range(2, 128)} | {"<unk>": 0, "<s>": 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Words(tokenizer, frozenset({2}))


def test_messages_are_routed_as_recorded(recorded: Callable[[str], list[dict[str, Any]]]) -> None:
    cases = recorded("router")
    assert len(cases) == 24
    for case in cases:
        assert EXPERTS.index(expert_of(case["input"])) == case["output"], case["input"]


def test_prompts_tokens_and_experts_of_whole_calls_are_the_recorded_ones(
    recorded: Callable[[str], list[dict[str, Any]]],
) -> None:
    cases = recorded("echo")
    assert len(cases) == 13
    for case in cases:
        asked, made = case["input"], case["output"]
        text = prompt(asked["message"], asked["n_images"])
        assert text == made["prompt"]
        assert [characters(start=False).prompt(text)] == made["input_ids_chars"]
        assert EXPERTS.index(expert_of(asked["message"])) == made["generate_kwargs"]["granularity"]


def test_pieces_between_pictures_are_encoded_as_recorded(recorded: Callable[[str], list[dict[str, Any]]]) -> None:
    cases = recorded("tokenizer_image_token")
    assert len(cases) == 16
    for case in cases:
        words = characters(start=case["input"]["char_tokenizer_bos"] is not None)
        assert words.prompt(case["input"]["prompt"]) == case["output"], case["input"]


def test_pictures_become_the_recorded_pixels(oracles: Path) -> None:
    folder = oracles / "rsunivlm" / "text"
    tensors = load_file(folder / "preprocess.safetensors")
    compared = 0
    for case in json.loads((folder / "preprocess.json").read_text()):
        aspect = case["image_aspect_ratio"]
        if aspect is None:  # the authors' code raises a TypeError; a checkpoint that names none is served as `square`
            continue
        grids = tuple((w, h) for w, h in case["image_grid_pinpoints"])
        processing = Processing(size=24, mean=HALF, std=HALF, aspect=aspect, merge=MergeConfig(tile=24, grids=grids))
        (name,) = [name for name in tensors if name.endswith(case["pic"]) and "out/" not in name]
        wanted = tensors[case["output"]]
        found = processing.views(tensors[name].numpy())
        torch.testing.assert_close(found.view(wanted.shape), wanted, atol=1e-6, rtol=0)
        compared += 1
    assert compared == 16


def asked(task: Task, **fields: Any) -> str:
    (ask,) = RSUniVLMDialect(384).ask(Query(task, IMAGE, **fields))
    assert EXPERTS[ask.expert] == expert_of(ask.message), "the task's expert is the one that its words call for"
    return ask.message


def test_tasks_are_asked_in_the_words_of_the_published_examples() -> None:
    assert asked("caption") == "[CAP] Describe this image briefly."
    assert asked("vqa", text="How many basketball courts?") == "[VQA] How many basketball courts?"
    assert asked("ground", text="windmill") == "[VG] Where is the windmill?"
    assert asked("segment", labels=("water",)) == "[SEG] water."
    change = "[SEG] Please segment the building area that have changed in the second image."
    assert asked("detect_change", text="building", after=IMAGE) == change


def test_segmentation_asks_once_for_each_class_and_change_shows_both_pictures() -> None:
    dialect = RSUniVLMDialect(384)
    assert [ask.message for ask in dialect.ask(Query("segment", IMAGE, labels=("water", "road")))] == [
        "[SEG] water.", "[SEG] road."
    ]  # fmt: skip
    (ask,) = dialect.ask(Query("detect_change", IMAGE, after=IMAGE))
    assert len(ask.images) == 2


def test_words_become_boxes_masks_and_change_on_the_pixels_of_the_picture() -> None:
    dialect = RSUniVLMDialect(384)
    said = Said("[10, 20, 30, 40] and [50, 50, 100, 100]", logprob=-1.0, tokens=10)
    boxes = dialect.read(Query("ground", IMAGE, text="ship"), [said])
    assert isinstance(boxes, TileObjects)
    assert boxes.boxes == [(6, 6, 18, 12), (30, 15, 60, 30)]
    assert boxes.scores[0] == pytest.approx(np.exp(-0.1))
    assert boxes.scale == pytest.approx(384 / 60)

    half = Said("others*1, water*1\nothers*2", logprob=-0.1, tokens=10)
    masks = dialect.read(Query("segment", IMAGE, labels=("water",)), [half])
    assert isinstance(masks, TileMasks)
    on = masks.probabilities[0] >= 255 * masks.thresholds[0]
    assert on[:15, 30:].all()
    assert on.sum() == 15 * 30

    change = dialect.read(Query("detect_change", IMAGE, after=IMAGE), [half])
    assert isinstance(change, TileChange)
    assert ((change.probabilities >= 255 * change.threshold) == on).all()


def test_a_doubtful_mask_stands_nearer_to_its_threshold_and_on_the_same_side() -> None:
    dialect, query = RSUniVLMDialect(384), Query("segment", IMAGE, labels=("water",))
    for logprob in (-1e-6, -1.0, -50.0):
        masks = dialect.read(query, [Said("others*1, water*1", logprob=logprob, tokens=1)])
        assert isinstance(masks, TileMasks)
        on = masks.probabilities[0] >= 255 * masks.thresholds[0]
        assert on[:, 30:].all()
        assert not on[:, :30].any()
