"""The backbone: padding, folding, taps."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from model_server.model.config import BackboneConfig, debug
from model_server.model.vision import Backbone, SameConv, square


def randomised(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    net = Backbone(debug().backbone).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return net


def test_folding_batch_norms_keeps_the_function() -> None:
    net = randomised()
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        maps, pooled = net(x)
        folded_maps, folded = net.fold_norms()(x)
    torch.testing.assert_close(pooled, folded, atol=1e-4, rtol=1e-4)
    for stride in maps:
        torch.testing.assert_close(maps[stride], folded_maps[stride], atol=1e-4, rtol=1e-4)


def test_maps_come_at_strides_4_8_16_32_for_any_even_or_odd_side() -> None:
    net = randomised()
    for side in (64, 65, 96):
        with torch.no_grad():
            maps, _ = net(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        assert {s: m.shape[-1] for s, m in maps.items()} == {s: -(-side // s) for s in (4, 8, 16, 32)}


def test_nano_has_the_channels_of_efficientnet_lite2() -> None:
    with torch.device("meta"):
        assert Backbone(BackboneConfig()).widths == {4: 24, 8: 48, 16: 120, 32: 352}


def test_same_padding_puts_the_odd_pixel_right_and_below() -> None:
    conv = SameConv(1, 1, 3, 2, bias=False)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2)
    assert torch.equal(conv(x), expected)


def test_an_image_of_the_right_size_passes_unchanged_and_others_are_resized() -> None:
    image = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
    assert torch.equal(square(image, 8), torch.from_numpy(image).permute(2, 0, 1))
    assert square(image, 5).shape == (3, 5, 5)
