"""FUSAR-GPT's two stages on a tiny model: nothing is changed at the start; knowledge trains TLM, tasks leave it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.config import DecoderConfig, ModulationConfig, QwenVisionConfig, QwenVLConfig
from model_server.model.modulation import Anchors
from model_server.model.qwen_vl import QwenVLM
from model_server.training.lora import add_lora, train_only

IMAGE, GRID = 9, (4, 4)  # the placeholder; patches, four of which share a token
IDS = torch.tensor([1, IMAGE, IMAGE, IMAGE, IMAGE, 3, 5, 2])
ANSWERS = 3  # the last ids


def tiny(modulated: bool = True) -> QwenVLM:
    torch.manual_seed(0)
    decoder = DecoderConfig(vocab_size=12, width=16, layers=2, heads=2, kv_heads=1, ffn=24, qkv_bias=True,
                            rope_sections=(2, 1, 1))  # fmt: skip
    vision = QwenVisionConfig(width=16, layers=2, heads=2, ffn=24, patch=4, window=16, full_layers=(1,))
    modulation = ModulationConfig() if modulated else None
    return QwenVLM(
        QwenVLConfig(name="tiny", vision=vision, decoder=decoder, image_token=IMAGE, modulation=modulation)
    )


def logits(model: QwenVLM, anchors: Anchors | None) -> Tensor:
    """[1, T, vocabulary] of a radar picture, three equal channels, before and after IDS."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(16, 1, 32, generator=generator).expand(-1, 3, -1).flatten(1)
    tokens = model.encode(patches, [GRID], anchors)
    return model.decoder.logits(model(model.prompt([IDS], [[(tokens[0], GRID)]])))


def some_anchors() -> Anchors:
    generator = torch.Generator().manual_seed(2)
    vectors = F.normalize(torch.randn(4, 64, generator=generator), dim=-1)
    return Anchors.of([(vectors, torch.rand(4, 2, generator=generator))], 64)


def trained(model: QwenVLM, stage: Literal["knowledge", "tasks"], steps: int = 3) -> dict[str, bool]:
    """Whether each part changed: the adaptations, the modulation, and all else."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = train_only(model, stage)
    optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if n in names], lr=1e-2)
    for _ in range(steps):
        said = logits(model, some_anchors())[0, -ANSWERS - 1 : -1]
        loss = F.cross_entropy(said, IDS[-ANSWERS:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    parts = {"lora": {n for n in before if n.endswith((".down", ".up"))},
             "modulation": {n for n in before if n.startswith("modulation.")}}  # fmt: skip
    rest = before.keys() - parts["lora"] - parts["modulation"]
    return {part: bool(members & changed) for part, members in {**parts, "rest": rest}.items()}


def test_before_training_adaptations_and_modulation_change_no_bit() -> None:
    plain, whole = tiny(modulated=False), tiny()
    whole.load_state_dict(plain.state_dict(), strict=False)
    add_lora(whole, rank=8, alpha=32)
    with torch.no_grad():
        assert torch.equal(logits(whole, some_anchors()), logits(plain, None))


def test_knowledge_trains_the_modulation_and_tasks_leave_it_as_it_is() -> None:
    model = tiny()
    add_lora(model, rank=8, alpha=32)
    assert trained(model, "knowledge") == {"lora": True, "modulation": True, "rest": False}
    assert trained(model, "tasks") == {"lora": True, "modulation": False, "rest": False}
    with torch.no_grad():
        assert not torch.equal(logits(model, some_anchors()), logits(model, None))


def test_a_model_without_modulation_has_no_two_stages() -> None:
    model = tiny(modulated=False)
    add_lora(model, rank=8, alpha=32)
    with pytest.raises(ValueError, match="need adaptations and a modulation"):
        train_only(model, "knowledge")
