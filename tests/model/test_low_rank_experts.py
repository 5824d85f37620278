"""G-MoE as low-rank deltas on a shared layer: copies at the start, only the deltas train, a batch may mix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model_server.model.config import EXPERTS, DecoderConfig
from model_server.model.decoder import Decoder
from model_server.model.experts import (
    GranularExperts,
    LowRankExperts,
    SwiGLU,
    start_as_copies,
    train_experts_only,
)

CONFIG = DecoderConfig(vocab_size=31, width=16, layers=2, heads=2, kv_heads=1, ffn=24, experts=EXPERTS, expert_rank=3)


def build(config: DecoderConfig = CONFIG, random: bool = True) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    if random:
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model


def run(model: Decoder, x: torch.Tensor, experts: list[int]) -> torch.Tensor:
    return model(x, torch.arange(x.shape[1]).expand(x.shape[:2]), "causal", torch.tensor(experts))


def test_an_expert_is_the_shared_layer_with_a_low_rank_difference_in_each_matrix() -> None:
    torch.manual_seed(0)
    module = LowRankExperts(8, 12, EXPERTS, 2)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 3, 8)
    weights = {}
    for name in ("gate", "up", "down"):
        base = module.shared.get_submodule(name).get_parameter("weight")
        delta = module.deltas.get_submodule(f"2.{name}")
        weights[name] = base + delta.get_parameter("up.weight") @ delta.get_parameter("down.weight")
    expected = F.linear(F.silu(F.linear(x, weights["gate"])) * F.linear(x, weights["up"]), weights["down"])
    torch.testing.assert_close(module(x, torch.tensor([2, 2])), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_experts_start_as_exact_copies_of_a_trained_layer(rank: int) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, expert_rank=rank)
    model, trained = build(config), SwiGLU(16, 24)
    for block in model.blocks:
        experts = block.get_submodule("experts")
        assert isinstance(experts, GranularExperts | LowRankExperts)
        start_as_copies(experts, trained)
    x = torch.randn(3, 5, 16)
    mixed = run(model, x, [0, 2, 1])
    plain = build(dataclasses.replace(config, experts=("image",), expert_rank=0))
    names = {n: p for n, p in model.state_dict().items() if ".experts." not in n}
    copies = {n: trained.state_dict()[n.split("experts.experts.0.")[1]] for n in plain.state_dict() if "experts" in n}
    plain.load_state_dict({**names, **copies})
    assert torch.equal(mixed, run(plain, x, [0, 0, 0])) or rank == 0
    torch.testing.assert_close(mixed, run(plain, x, [0, 0, 0]), atol=1e-6, rtol=1e-6)


def test_a_new_model_has_deltas_of_zero() -> None:
    model, x = build(random=False), torch.randn(1, 4, 16)
    assert torch.equal(run(model, x, [0]), run(model, x, [2]))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_mixed_batch_equals_each_request_alone_forward_and_backward(rank: int) -> None:
    model = build(dataclasses.replace(CONFIG, expert_rank=rank))
    x, experts = torch.randn(5, 6, 16), [1, 0, 1, 2, 0]
    together = run(model, x, experts)
    together.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, expert in enumerate(experts):
        alone = run(model, x[row : row + 1], [expert])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
        alone.square().sum().backward()
    for name, p in model.named_parameters():
        if name in grads:
            assert p.grad is not None
            torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("rank", "part"), [(0, ".experts.experts."), (3, ".experts.deltas.")])
def test_in_stage_two_only_experts_train_and_only_those_that_are_asked(rank: int, part: str) -> None:
    model = build(dataclasses.replace(CONFIG, expert_rank=rank))
    names = train_experts_only(model)
    assert names
    assert all(part in name for name in names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    run(model, torch.randn(2, 4, 16), [2, 2]).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert reached == {n for n in names if f"{part}2." in n}


def test_low_rank_experts_cost_a_fraction_of_whole_ones() -> None:
    sizes = [sum(p.numel() for p in build(dataclasses.replace(CONFIG, expert_rank=r)).blocks.parameters())
             for r in (0, 3)]  # fmt: skip
    whole, rank = 3 * 16 * 24, 3 * 3 * (16 + 24)
    assert sizes[0] - sizes[1] == 2 * (3 * whole - whole - 3 * rank)
