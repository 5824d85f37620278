"""Linear layers with weights in eight bits against the layers they were made of."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model_server.model.config import EXPERTS, ModelConfig, debug
from model_server.model.half import halve
from model_server.model.int8 import FEW_ROWS, TILE, Int8Linear, quantise
from model_server.model.rsvlm import RSVLM

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]
WEIGHT = 1 / 254  # of its row's largest: half a step, the most by which a weight may be off
LOGITS = 0.03  # of the largest: how far logits of the whole decoder may lie from float32


def layer(into: int, out: int, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(into, out, bias=bias)


def rounding(weight: Tensor, x: Tensor) -> Tensor:
    """The most by which outputs [R, out] may be off when each weight is off by half a step."""
    return x.abs().sum(-1, keepdim=True) * weight.abs().amax(1) * WEIGHT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 100])
@pytest.mark.parametrize(("into", "bias"), [(64, True), (96, False), (17, True)])
@torch.inference_mode()
def test_outputs_are_off_by_no_more_than_half_a_step_of_every_weight(
    device: str, dtype: torch.dtype, rows: int, into: int, bias: bool
) -> None:
    plain = layer(into, 40, bias).to(device)
    x = torch.randn(rows, 2, into, device=device)[:, 0].to(dtype)  # not contiguous
    y = Int8Linear(plain.weight, plain.bias)(x)
    assert y.dtype is dtype
    expected = plain(x.float())
    allowed = rounding(plain.weight, x.float()) + (2**-7 * expected.abs() + 1e-3 if dtype == torch.bfloat16 else 1e-5)
    assert ((y.float() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_few_rows_many_rows_and_several_tiles_compute_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_server.model.int8.GPU_TILE", TILE)
    plain = layer(2048, TILE // 2048 + 5, bias=True).to(device)
    small = Int8Linear(plain.weight, plain.bias)
    assert len(small.weight.split(TILE // 2048)) == 2
    x = torch.randn(FEW_ROWS + 1, 2048, device=device).bfloat16()
    torch.testing.assert_close(small(x[:FEW_ROWS]), small(x)[:FEW_ROWS], rtol=2**-7, atol=1e-2)


@torch.inference_mode()
def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = torch.arange(8) / 7
    y = Int8Linear(weight)(torch.ones(1, 8))
    assert y[0, 0] == y[0, 2] == 0
    assert y[0, 1] == pytest.approx(4, rel=WEIGHT)


def configs() -> list[ModelConfig]:
    config = debug()
    return [config, replace(config, decoder=replace(config.decoder, experts=EXPERTS, expert_rank=4))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", configs(), ids=["single", "low-rank"])
@torch.inference_mode()
def test_a_whole_model_in_eight_bits_stays_close_to_float32(config: ModelConfig, device: str) -> None:
    torch.manual_seed(0)
    exact = RSVLM(config).eval().to(device)
    exact.backbone.fold_norms()
    small = copy.deepcopy(exact)
    halve(small)
    quantise(small)
    side = config.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, device=device)
    found = []
    for model in (exact, small):
        tasks, expert = torch.full((2,), 5, device=device), torch.zeros(2, dtype=torch.long)
        found.append(model.prefill(model.encode(images), tasks, None, expert, 1)[0].float())
    assert (found[1] - found[0]).abs().max() <= LOGITS * found[0].abs().max()


def test_what_answers_are_read_off_keeps_its_weights() -> None:
    model = RSVLM(debug()).eval()
    halve(model)
    quantise(model)
    rounded = {name for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    left = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {"decoder.blocks.0.qkv", "question_states", "image_token"} <= rounded
    assert all(name.split(".")[0] in ("sentence", "heads", "sfi") or name.startswith(("decoder.mda", "decoder.head"))
               for name in left)  # fmt: skip
    assert "decoder.head.layer" in left
