"""The encoder and the dense branch as packed for the CPU compute what the plain ones compute in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from model_server.model.config import debug
from model_server.model.dense import DenseBranch, Maps, early_maps
from model_server.model.half import InFloat32
from model_server.model.packed import can_pack
from model_server.model.packed_vision import PackedPointwise, PackedResidual, pack_backbone, pack_blocks, pack_dense
from model_server.model.vision import Backbone, ConvNorm, InvertedResidual

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this build of PyTorch has no fused kernels")
CLOSE = 1e-4


def backbones() -> tuple[Backbone, Backbone]:
    """A plain one with norms of some training behind them, and the same packed."""
    torch.manual_seed(0)
    plain = Backbone(debug().backbone)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean, module.running_var = torch.randn(module.num_features), torch.rand(module.num_features)
    plain = plain.eval().fold_norms()
    packed = copy.deepcopy(plain)
    pack_backbone(packed)
    return plain, packed


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def assert_same(packed: Maps, plain: Maps) -> None:
    assert list(packed) == list(plain)
    for stride, expected in plain.items():
        torch.testing.assert_close(packed[stride], expected, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(("stride", "kernel", "expansion"), [(1, 3, 6), (1, 5, 1), (2, 3, 6), (2, 5, 2)])
@torch.inference_mode()
def test_a_packed_block_equals_the_plain_one_at_even_and_odd_sides(stride: int, kernel: int, expansion: int) -> None:
    plain = InvertedResidual(8, 8, expansion, kernel, stride).eval()
    for part in plain.modules():
        if isinstance(part, ConvNorm):
            part.fold()
    packed = nn.ModuleList([plain])
    pack_blocks(packed)
    assert isinstance(packed[0], PackedResidual)
    for sides in ((16, 24), (15, 16), (16, 13), (7, 9)):
        x = torch.randn(2, 8, *sides).to(memory_format=torch.channels_last)
        torch.testing.assert_close(packed[0](x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", [(64, 64), (50, 70), (32, 96)])
@pytest.mark.parametrize("together", [None, 1, 2 * 64 * 64])
@torch.inference_mode()
def test_a_packed_encoder_equals_the_plain_one_however_many_images_go_together(
    sides: tuple[int, int], together: int | None
) -> None:
    plain, packed = backbones()
    packed.together = together
    images = pictures(5, *sides)
    (maps, pooled), (expected, mean) = packed(images), plain(images)
    assert_same(maps, expected)
    torch.testing.assert_close(pooled, mean, atol=CLOSE, rtol=CLOSE)


@torch.inference_mode()
def test_a_head_of_its_own_precision_is_packed_in_it() -> None:
    plain, _ = backbones()
    packed = copy.deepcopy(plain)
    packed.head = InFloat32(packed.head)  # pyright: ignore[reportAttributeAccessIssue] (as serving in half precision)
    pack_backbone(packed)
    assert isinstance(packed.head.layer, PackedPointwise)
    images = pictures(1, 64, 64)
    torch.testing.assert_close(packed(images)[1], plain(images)[1], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("sides", [(64, 96), (32, 32)])
@torch.inference_mode()
def test_a_packed_dense_branch_equals_the_plain_one(sides: tuple[int, int]) -> None:
    backbone, packed_backbone = backbones()
    config = debug()
    plain = DenseBranch(config).eval()
    packed = copy.deepcopy(plain)
    pack_dense(packed)
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in packed.modules())
    images, phrases = pictures(2, *sides), torch.randn(2, 3, config.sentence.width)
    shared = plain.config.shared
    expected = plain.maps(early_maps(backbone, images, shared))
    maps = packed.maps(early_maps(packed_backbone, images, shared))
    assert_same(maps, expected)
    features, x = packed.features(maps), plain.features(expected)
    torch.testing.assert_close(features, x, atol=CLOSE, rtol=CLOSE)
    found, these = packed.detect(features, phrases), plain.detect(x, phrases)
    pairs = [(found.heat, these.heat), (found.distances, these.distances), (found.quality, these.quality),
             (packed.segment(features, phrases), plain.segment(x, phrases)),
             (packed.change(maps, maps), plain.change(expected, expected))]  # fmt: skip
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=CLOSE, rtol=CLOSE)


def test_what_is_not_folded_is_refused() -> None:
    with pytest.raises(ValueError, match="fold_norms"):
        pack_backbone(Backbone(debug().backbone))
