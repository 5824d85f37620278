"""Sequences in static slots against the same ones prefilled and searched as one batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from model_server.checkpoints.store import Checkpoint, load_checkpoint
from model_server.model.attention import KVCache
from model_server.model.generate import beam_search
from model_server.model.seen import prefixes, see
from model_server.model.slots import Lane, Prefix, prefill, visual_prefix

STEPS, BEAMS, POWER = 9, 3, 0.3


@pytest.fixture(scope="module")
def loaded(debug_weights: Path) -> Checkpoint:
    return load_checkpoint(debug_weights)


@torch.inference_mode()
@pytest.mark.parametrize("turned", [False, True])
def test_sequences_that_join_one_by_one_are_written_as_a_batch_of_them_is(loaded: Checkpoint, turned: bool) -> None:
    model, end, task = loaded.model, loaded.tokenizer.end, loaded.tokenizer.tasks["[CAP]"]
    views, n = model.config.views if turned else 1, 4
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool)
    rows = views * n
    logits, state = model.prefill(
        model.encode(images, turned), torch.full((rows,), task), None, torch.zeros(rows, dtype=torch.long), STEPS, views
    )
    batch = beam_search(
        model, logits, state, beams=BEAMS, steps=STEPS, end=end, banned=banned, length_power=POWER
    )  # fmt: skip

    lane = Lane(model, sequences=3, views=views, prompt=model.visual_tokens + 1, beams=BEAMS, steps=STEPS, end=end,
                banned=banned, length_power=POWER)  # fmt: skip
    seen, said = see(model, images), {}
    coming = list(range(n))
    while coming or len(lane):
        if coming and lane.free:
            i = coming.pop(0)
            prefix = Prefix.joined(prefixes(model, [seen[i]], views, 0))
            said.update(lane.join([i], prefill(model, prefix, task, None)))
        said.update(lane.step())
    for i, expected in enumerate(batch):
        assert [h.ids for h in said[i]] == [h.ids for h in expected]
        assert [h.logprob for h in said[i]] == pytest.approx([h.logprob for h in expected], abs=1e-3)


@torch.inference_mode()
def test_a_prefix_holds_the_keys_and_values_of_a_whole_pass_through_the_decoder(loaded: Checkpoint) -> None:
    model, c = loaded.model, loaded.model.config.decoder
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    features, expert = model.encode(images), torch.zeros(3, dtype=torch.long)
    cache = KVCache(c.layers, 3, c.kv_heads, model.visual_tokens, c.width // c.heads, features.visual)
    places = torch.arange(model.visual_tokens).expand(3, -1)
    model.decoder(features.visual, places, None, expert, features.windows, cache)
    assert model.config.fusion.mda_layers == (c.layers - 1,)  # the last block is preceded by a look at the maps
    torch.testing.assert_close(visual_prefix(model, features, 0).keys, cache.data)


@torch.inference_mode()
def test_half_precision_stays_close_to_float32(loaded: Checkpoint) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    task, found = loaded.tokenizer.tasks["[CAP]"], []
    for model in (loaded.model, copy.deepcopy(loaded.model).bfloat16()):
        prefix = Prefix.joined(prefixes(model, see(model, images), model.config.views, 0))
        found.append(prefill(model, prefix, task, None).logits.float())
    exact, half = found
    assert (half - exact).abs().max() <= 0.03 * exact.abs().max()
    assert (half.log_softmax(-1) - exact.log_softmax(-1)).abs().mean() <= 0.02
