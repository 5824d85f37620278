"""Aquila's architecture at a tiny size: pyramid, SFI, MDA, cached decoding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_server.model.config import AquilaConfig, ConvNeXtConfig, DecoderConfig, FusionConfig

pytest.importorskip("transformers")

from model_server.model.aquila import AquilaVLM

CONFIG = AquilaConfig(
    name="tiny", image_size=64, backbone=ConvNeXtConfig(widths=(4, 8, 8, 12), depths=(1, 1, 1, 1)),
    decoder=DecoderConfig(vocab_size=23, width=24, layers=3, heads=4, kv_heads=2, ffn=32, tied=False),
    fusion=FusionConfig(grid=2, strides=(4, 8, 16, 32), query_from_last=False, mda_layers=(1, 2), width=16),
)  # fmt: skip


def build(config: AquilaConfig = CONFIG) -> AquilaVLM:
    torch.manual_seed(0)
    model = AquilaVLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_a_query_has_the_published_85_keys() -> None:
    model = build()
    windows = model.encode(torch.randn(1, 3, 64, 64)).windows
    assert {s: w.shape[1:3] for s, w in windows.items()} == {4: (4, 64), 8: (4, 16), 16: (4, 4), 32: (4, 1)}


def test_cached_decoding_equals_the_full_pass_also_in_a_padded_batch() -> None:
    model = build().requires_grad_(False)
    scenes = model.encode(torch.randn(2, 3, 64, 64))
    rows, expert = [torch.tensor([1, 5]), torch.tensor([2, 3, 4, 6])], torch.zeros(2, dtype=torch.long)
    ids, logits = model.greedy(model.prompt(scenes, rows), expert, 4, None)
    for row in range(2):
        one = dataclasses.replace(
            scenes, tokens=scenes.tokens[row : row + 1],
            windows={s: w[row : row + 1] for s, w in scenes.windows.items()},
        )  # fmt: skip
        for t in range(4):
            hidden = model(model.prompt(one, [torch.cat((rows[row], ids[row, :t]))]), expert[:1])
            torch.testing.assert_close(logits[row, t], model.decoder.logits(hidden[0, -1]), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_part_and_shared_mda_is_one_module() -> None:
    for shared in (False, True):
        model = build(dataclasses.replace(CONFIG, fusion=dataclasses.replace(CONFIG.fusion, mda_shared=shared)))
        prompt = model.prompt(model.encode(torch.randn(1, 3, 64, 64)), [torch.tensor([1, 2])])
        model.decoder.logits(model(prompt, torch.tensor([0]))).square().sum().backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
        assert silent == set()
        assert len({id(m) for m in model.decoder.mda.values()}) == (1 if shared else 2)


def test_a_size_that_does_not_divide_into_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        AquilaVLM(dataclasses.replace(CONFIG, image_size=96))
