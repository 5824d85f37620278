"""Saying and weighing words over a prefilled network; pixels of CLIP towers and Qwen-VL; pictures kept for later."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model_server.checkpoints.adapters.fusar_inputs import native_size
from model_server.checkpoints.published import UnsupportedLayout
from model_server.families import rsunivlm
from model_server.families.asking import Ask
from model_server.families.llava_speaker import LlavaSpeaker
from model_server.families.pictures import Processing, clip_processing
from model_server.families.seen import SeenPictures, Shown
from model_server.families.speaking import greedy, weigh
from model_server.families.words import NoTokenizer, Words

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def speaker(spoken: Callable[..., Path]) -> LlavaSpeaker:
    folder = spoken("rsunivlm", max_position_embeddings=256)
    found = rsunivlm.open_checkpoint(folder, "cpu", torch.float32).speaker
    assert isinstance(found, LlavaSpeaker)
    return found


def test_an_option_weighs_what_its_tokens_have_as_probability_with_the_end(speaker: LlavaSpeaker) -> None:
    model, words = speaker.model, speaker.words
    prompt = speaker._prompt([Ask((PICTURE,), "[CLS] which?", 0)])
    options = [words.answer(text) for text in ("farm", "farmland", "a")]
    end = next(iter(words.ends))
    with torch.no_grad():
        logits, state = model.prefill(prompt, torch.tensor([0]), 10)
        filled = state.cache.filled
        found = weigh(model.step, logits, state, options, [end])
        assert state.cache.filled == filled, "the state is left as it was"
        for option, weight in zip(options, found, strict=True):
            whole = torch.cat((prompt.embeddings, model.decoder.embed(torch.tensor([option]))), 1)
            longer = type(prompt)(whole, torch.ones(1, whole.shape[1], dtype=torch.bool), None)
            logp = model.decoder.logits(model(longer, torch.tensor([0]))).log_softmax(-1)[0, -len(option) - 1 :]
            wanted = logp.gather(1, torch.tensor([*option, end])[:, None]).sum()
            assert weight == pytest.approx(float(wanted), abs=1e-3)


def test_what_is_said_has_the_probability_of_its_tokens_and_stops_at_an_end(speaker: LlavaSpeaker) -> None:
    model = speaker.model
    prompt = speaker._prompt([Ask((PICTURE,), "[CAP] x", 6)])
    with torch.no_grad():
        ids, steps = model.greedy(prompt, torch.tensor([0]), 6, None)
        logp = steps.log_softmax(-1).max(-1).values[0]
        logits, state = model.prefill(prompt, torch.tensor([0]), 6)
        (free,) = greedy(model.step, logits, state, 6, [-1])
        logits, state = model.prefill(prompt, torch.tensor([0]), 6)
        last = int(ids[0, 3])
        at = ids[0].tolist().index(last)
        (cut,) = greedy(model.step, logits, state, 6, [last])
    assert free.ids == tuple(ids[0].tolist())
    assert free.logprob == pytest.approx(float(logp.sum()), abs=1e-3)
    assert (cut.ids, cut.tokens) == (tuple(ids[0, :at].tolist()), at + 1)
    assert cut.logprob == pytest.approx(float(logp[: at + 1].sum()), abs=1e-3)


def test_what_was_said_loses_as_the_checkpoints_generation_config_has_it(spoken: Callable[..., Path]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, ask = spoken("rsunivlm", max_position_embeddings=256), Ask((PICTURE,), "[CAP] x", 12)
    said = []
    for penalty in (1.0, 3.0):
        (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": penalty, "eos_token_id": 2}))
        opened = rsunivlm.open_checkpoint(folder, "cpu", torch.float32).speaker
        assert isinstance(opened, LlavaSpeaker)
        model, ids = opened.model, torch.zeros(1, 0, dtype=torch.long)
        lost = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        with torch.no_grad():
            logits, state = model.prefill(opened._prompt([ask]), torch.tensor([0]), 12)
            while ids.shape[1] < 12 and 2 not in ids:
                ids = torch.cat((ids, lost(ids, logits).argmax(-1)[None]), 1)
                logits = model.step(ids[:, -1], state)
        said.append(opened.say([ask])[0].text)
        assert said[-1] == opened.words.text(ids[0].tolist())
    assert said[0] != said[1]
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4, "eos_token_id": 2}))
    with pytest.raises(UnsupportedLayout, match="num_beams = 4"):
        Words.load(folder)


def test_messages_said_together_are_said_as_each_alone(speaker: LlavaSpeaker) -> None:
    other = PICTURE[:, ::-1].copy()
    asks = [
        Ask((PICTURE,), "[CAP] a", 8), Ask((other,), "[VG] where is it?", 8, expert=1),
        Ask((PICTURE, other), "[SEG] b", 8, expert=2), Ask((other,), "[CLS] c", 0, options=("a", "b")),
    ]  # fmt: skip
    together = speaker.say(asks)
    for ask, said in zip(asks, together, strict=True):
        (alone,) = speaker.say([ask])
        assert said.text == alone.text
        assert said.logprob == pytest.approx(alone.logprob, abs=1e-3)


def test_speech_ends_with_the_positions_the_decoder_was_trained_for(speaker: LlavaSpeaker) -> None:
    (said,) = speaker.say([Ask((PICTURE,), "[SEG] b", 4096, expert=2)])
    prompt = speaker._prompt([Ask((PICTURE,), "[SEG] b", 4096)])
    assert said.tokens <= 256 - prompt.real.shape[1]


def test_a_clip_towers_pixels_are_those_of_transformers(tmp_path: Path) -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = pil.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs.save_pretrained(tmp_path)
    plain = Processing(size=336, mean=(0.0,) * 3, std=(1.0,) * 3, crop=True)
    ours = clip_processing(tmp_path / "preprocessor_config.json", plain)
    assert ours.size == 28
    for picture in (PICTURE, PICTURE.transpose(1, 0, 2), PICTURE[:, :30]):
        wanted = theirs(np.ascontiguousarray(picture), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours.views(np.ascontiguousarray(picture)), wanted, atol=1e-5, rtol=0)


def test_processing_that_is_not_done_here_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"shortest_edge": 30}, "crop_size": {"height": 28, "width": 28}}')
    with pytest.raises(UnsupportedLayout, match="resizes to 30 and crops 28"):
        clip_processing(path, Processing(size=28, mean=(0.0,) * 3, std=(1.0,) * 3))


def test_qwen_vl_looks_at_the_sizes_that_its_authors_choose() -> None:
    qwen = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    for width, height in ((64, 64), (512, 512), (2048, 300), (1000, 999), (30, 45), (2048, 2048)):
        h, w = qwen.smart_resize(height, width, 28, 56 * 56, 1280 * 28 * 28)
        assert native_size(width, height, 28, 56 * 56, 1280 * 28 * 28) == (w, h)


def test_a_picture_is_encoded_once_and_the_one_used_longest_ago_is_forgotten_first() -> None:
    made: list[int] = []

    def encode(pictures: Sequence[Shown]) -> list[int]:
        made.extend(int(picture[0]) for picture, in pictures)
        return [int(picture[0]) for picture, in pictures]

    seen: SeenPictures[int] = SeenPictures(lambda _: 10, limit=20)
    a, b, c = ((np.array([n]),) for n in range(3))
    assert seen.of([a, b, (a[0].copy(),)], encode, 8) == [0, 1, 0]
    assert seen.of([a, c], encode, 8) == [0, 2]  # b goes
    assert seen.of([a, c, b], encode, 1) == [0, 2, 1]
    assert made == [0, 1, 2, 1]


def test_a_folder_without_tokenizer_or_end_is_refused(tmp_path: Path, spoken: Callable[..., Path]) -> None:
    with pytest.raises(NoTokenizer, match=r"put the checkpoint's tokenizer\.json"):
        Words.load(tmp_path)
    folder = spoken("rsunivlm", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(NoTokenizer, match="which token ends an answer"):
        Words.load(folder)
