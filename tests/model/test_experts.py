"""G-MoE as full copies: what equal experts compute, and that a batch may mix granularities."""

from __future__ import annotations

import pytest
import torch

from model_server.checkpoints.published import decoder_plan, fill
from model_server.model.config import EXPERTS, DecoderConfig, LlavaConfig, ViTConfig
from model_server.model.decoder import Decoder
from model_server.model.experts import ROUTES, UnknownTask, route
from model_server.model.llava import IMAGE, LlavaVLM, PlaceholderMismatch, Prompt

DECODER = DecoderConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, ffn=48, experts=EXPERTS, qkv_bias=True, tied=False
)


def build() -> LlavaVLM:
    """A tiny model of RSUniVLM's kind whose three experts differ."""
    torch.manual_seed(0)
    vision = ViTConfig(width=16, layers=2, heads=2, ffn=24, image_size=12, patch=4)
    model = LlavaVLM(LlavaConfig(name="tiny", vision=vision, decoder=DECODER, feature=2)).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def prompts(model: LlavaVLM) -> list[Prompt]:
    """One sequence with an image, one with text alone, one with two images."""
    image = torch.randn(3, 1, 3, 12, 12, generator=torch.Generator().manual_seed(1)).unbind()
    first, second, third = model.encode(list(image))
    rows = [([7, IMAGE, 3, 9], [first]), ([5, 4, 3, 2, 1], []), ([IMAGE, 8, IMAGE], [second, third])]
    return [model.prompt([torch.tensor(ids)], [images]) for ids, images in rows]


def joined(alone: list[Prompt]) -> Prompt:
    length = max(p.real.shape[1] for p in alone)
    pads = [length - p.real.shape[1] for p in alone]
    return Prompt(
        torch.cat([torch.nn.functional.pad(p.embeddings, (0, 0, 0, n)) for p, n in zip(alone, pads, strict=True)]),
        torch.cat([torch.nn.functional.pad(p.real, (0, n)) for p, n in zip(alone, pads, strict=True)]),
        None,
    )


def test_three_equal_experts_are_the_plain_qwen2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    plain = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = Decoder(DECODER).eval().requires_grad_(False)
    copies = {}
    for name, tensor in plain.state_dict().items():
        for e in range(3) if ".mlp." in name else (None,):
            copies[name if e is None else name.replace(".mlp.", f".mlp.{e}.")] = lambda t=tensor: t
    assert fill(ours, decoder_plan(DECODER, ours=""), copies, ()).fits
    ids = torch.randint(0, 61, (3, 8))
    positions, mask = torch.arange(8).expand(3, 8), torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    hidden = ours(ours.embed(ids), positions, mask, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(ours.logits(hidden), plain(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_a_mixed_batch_equals_each_request_alone_with_and_without_a_cache() -> None:
    model = build()
    alone, experts = prompts(model), torch.tensor([2, 0, 1])
    together, logits = model.greedy(joined(alone), experts, 5, None)
    for row, prompt in enumerate(alone):
        ids, own = model.greedy(prompt, experts[row : row + 1], 5, None)
        assert ids[0].tolist() == together[row].tolist()
        torch.testing.assert_close(logits[row], own[0], atol=1e-4, rtol=0)
        grown = prompt
        for step in range(5):
            last = model.decoder.logits(model(grown, experts[row : row + 1])[:, -1])
            torch.testing.assert_close(own[:, step], last, atol=1e-4, rtol=0)
            grown = Prompt(
                torch.cat((grown.embeddings, model.decoder.embed(ids[:, step : step + 1])), 1),
                torch.nn.functional.pad(grown.real, (0, 1), value=True),
                None,
            )


def test_another_expert_gives_another_answer_and_leaves_the_other_rows_alone() -> None:
    model = build()
    batch = joined(prompts(model))
    first, _ = model.prefill(batch, torch.tensor([2, 0, 1]), 0)
    second, _ = model.prefill(batch, torch.tensor([2, 1, 1]), 0)
    changed = (first - second).abs().amax(1)
    assert changed[1] > 1e-2
    assert changed[[0, 2]].max() < 1e-4


def test_every_task_token_has_its_row_among_the_three() -> None:
    rows = {"image": 0, "region": 1, "pixel": 2}
    assert {token: route(token, EXPERTS) for token in ROUTES} == {t: rows[name] for t, name in ROUTES.items()}
    with pytest.raises(UnknownTask, match=r"\[seg\]"):
        route("[seg]", EXPERTS)  # tokens are case-sensitive, as published


def test_images_and_placeholders_must_be_as_many() -> None:
    model = build()
    image = model.encode([torch.zeros(1, 3, 12, 12)])
    with pytest.raises(PlaceholderMismatch, match="2 image placeholders for 1 images"):
        model.prompt([torch.tensor([IMAGE, 4, IMAGE])], [image])
    with pytest.raises(ValueError, match="12x12"):
        model.encode([torch.zeros(1, 3, 16, 16)])
