"""SFI and MDA as packed for the CPU compute what the plain ones compute in float32."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from model_server.model.config import ModelConfig, debug
from model_server.model.packed import can_pack
from model_server.model.packed_fusion import PackedIntegration, pack_fusion
from model_server.model.rsvlm import RSVLM
from model_server.model.slots import visual_prefix

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this build of PyTorch has no fused kernels")


def trained(config: ModelConfig) -> RSVLM:
    """No parameter as it starts, so that none is zero or one."""
    torch.manual_seed(0)
    model = RSVLM(config).eval()
    parts = [model.cut, model.decoder.mda, *(part for part in (model.sfi, model.from_last) if part is not None)]
    for part in parts:
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "change", [{}, {"mda_layers": (0, 1), "mda_shared": True}, {"sfi": False}, {"query_from_last": False, "width": 16}]
)
@torch.inference_mode()
def test_visual_tokens_and_prefixes_are_those_of_the_plain_model(change: dict[str, Any]) -> None:
    config = debug()
    plain = trained(replace(config, fusion=replace(config.fusion, **change)))
    packed = copy.deepcopy(plain)
    pack_fusion(packed)
    assert all(isinstance(mda, PackedIntegration) for mda in packed.decoder.mda.values())
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features, expected = packed.encode(images), plain.encode(images)
    torch.testing.assert_close(features.visual, expected.visual, atol=1e-4, rtol=1e-4)
    keys = visual_prefix(packed, features, 0).keys
    torch.testing.assert_close(keys, visual_prefix(plain, expected, 0).keys, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_one_operation_for_several_layers_stays_one() -> None:
    config = debug()
    model = trained(replace(config, fusion=replace(config.fusion, mda_layers=(0, 1), mda_shared=True)))
    pack_fusion(model)
    assert model.decoder.mda["0"] is model.decoder.mda["1"]
