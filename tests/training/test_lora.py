"""LoRA: nothing at the start, only its own matrices train, and merged it is one plain layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_server.model.config import DecoderConfig
from model_server.model.decoder import Decoder
from model_server.training.lora import LoRA, add_lora, lora_state, merge_lora

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def build(rank: int = 0) -> nn.ModuleDict:
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, ffn=24,
                           experts=("image", "region"), expert_rank=rank)  # fmt: skip
    return nn.ModuleDict({"decoder": Decoder(config)})


def run(model: nn.Module) -> torch.Tensor:
    positions, expert = torch.arange(5).expand(2, 5), torch.tensor([1, 0])
    return model.get_submodule("decoder")(X, positions, "causal", expert)


@pytest.mark.parametrize("expert_rank", [0, 2])
def test_an_untrained_adaptation_changes_nothing_and_only_it_trains(expert_rank: int) -> None:
    model = build(expert_rank)
    before, state = run(model).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    names = add_lora(model, rank=4, alpha=8)
    assert "decoder.blocks.0.qkv" in names
    assert torch.equal(run(model), before)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {f"{name}.{part}" for name in names for part in ("down", "up")}
    optimiser = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):  # `down` has no gradient until `up` is not zero
        optimiser.zero_grad()
        (run(model) * torch.arange(16)).sum().backward()
        optimiser.step()
    silent = {n for n, p in trainable.items() if p.grad is None or not p.grad.abs().sum()}
    assert silent == set()
    assert (run(model) - before).abs().max() > 1e-3
    kept = {n.replace(".base.", "."): v for n, v in model.state_dict().items() if not n.endswith((".down", ".up"))}
    assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_merged_it_computes_the_same_under_the_models_own_names() -> None:
    model = build()
    names = set(model.state_dict())
    add_lora(model, rank=4, alpha=8)
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.up, std=0.3)
    adapted = run(model)
    assert set(lora_state(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(run(model), adapted, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    layer = LoRA(nn.Linear(16, 3), rank=2, alpha=2, dropout=0.5)
    nn.init.normal_(layer.up)
    assert not torch.equal(layer.train()(X), layer(X))
    assert torch.equal(layer.eval()(X), layer(X))


def test_layers_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="0 linear layers match 'nowhere'"):
        add_lora(build(), rank=4, alpha=8, layers="nowhere")
