"""The decoder against Llama and Qwen2 of `transformers`, on random weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_server.checkpoints.published import decoder_config, decoder_plan, fill
from model_server.model.attention import KVCache, rotary_table
from model_server.model.decoder import Decoder
from model_server.model.rsvlm import prompt_mask

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
FAMILIES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "llama_grouped_tied": {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
                           "tie_word_embeddings": True, "rope_theta": 500000.0},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
              "rope_theta": 1000000.0},
    "qwen2_untied": {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
                     "tie_word_embeddings": False, "rope_theta": 50000.0},
}  # fmt: skip


def build(family: str) -> tuple[Any, Decoder]:
    """Their model with random weights, and ours filled from it."""
    torch.manual_seed(0)
    raw = {**SIZES, **FAMILIES[family]}
    base = raw.get("rope_theta", 10000.0)
    theirs_raw = {k: v for k, v in raw.items() if k != "rope_theta"}
    kind = "Llama" if family.startswith("llama") else "Qwen2"
    config = getattr(transformers, f"{kind}Config")(
        **theirs_raw, rope_parameters={"rope_type": "default", "rope_theta": base}, attn_implementation="eager"
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = Decoder(decoder_config(raw, qkv_bias=kind == "Qwen2")).eval().requires_grad_(False)
    published = theirs.state_dict()
    tied = (r"lm_head\.weight",) if raw["tie_word_embeddings"] else ()
    report = fill(ours, decoder_plan(ours.config, ours=""), {k: lambda v=v: v for k, v in published.items()}, tied)
    assert report.fits, report.lines()
    return theirs, ours


def batch(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [2, 9], which are real, and positions that count the real ones."""
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 9, dtype=torch.bool)
    if side == "left":
        real[1, :4] = False
    if side == "right":
        real[1, -4:] = False
    return ids, real, (real.long().cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_forward_equals_transformers_also_in_a_padded_batch(family: str, side: str) -> None:
    theirs, ours = build(family)
    ids, real, positions = batch(side)
    expected = theirs(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    hidden = ours(ours.embed(ids), positions, prompt_mask(real, 0), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(ours.logits(hidden)[real], expected[real], atol=1e-4, rtol=0)
    assert expected.abs().max() > 1  # the comparison is of numbers of some size


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_decoding_over_the_static_cache_equals_transformers_without_one(family: str, side: str) -> None:
    theirs, ours = build(family)
    ids, real, positions = batch(side)
    c = ours.config
    expert = torch.zeros(2, dtype=torch.long)
    cache = KVCache(c.layers, 2, c.kv_heads, 9 + 4, c.width // c.heads, torch.zeros(()))
    ours(ours.embed(ids), positions, prompt_mask(real, 0), expert, cache=cache)
    seen, after = torch.nn.functional.pad(real, (0, 4), value=True), positions.amax(1) + 1
    for step in range(4):
        token = torch.tensor([5 + step, 11 + step])
        mask = seen[:, None, None, : cache.filled + 1]
        hidden = ours(ours.embed(token)[:, None], (after + step)[:, None], mask, expert, cache=cache)
        ids = torch.cat((ids, token[:, None]), 1)
        for row in range(2):
            whole = torch.cat((ids[row, :9][real[row]], ids[row, 9:]))[None]
            expected = theirs(input_ids=whole).logits[0, -1]
            torch.testing.assert_close(ours.logits(hidden)[row, 0], expected, atol=1e-4, rtol=0)


def test_three_part_positions_turn_as_in_qwen2_5_vl() -> None:
    module = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    positions = torch.randint(0, 40, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    expected = module.Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), positions)
    for ours, theirs in zip(rotary_table(positions, 16, 10000.0, (2, 3, 3)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_three_part_positions_that_agree_are_plain_ones_and_wrong_sections_are_refused() -> None:
    plain = torch.arange(6)[None]
    three = rotary_table(plain.expand(3, 1, 6), 16, 10000.0, (2, 3, 3))
    for a, b in zip(three, rotary_table(plain, 16, 10000.0), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="add up to 8"):
        rotary_table(plain.expand(3, 1, 6), 16, 10000.0, (2, 3))
