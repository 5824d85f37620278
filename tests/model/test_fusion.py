"""SFI against the equations as published, computed the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from model_server.model.fusion import MapWindows, SpatialIntegration

WIDTHS = {8: 5, 16: 7, 32: 11}


def build(grid: int = 2, width: int = 12) -> tuple[MapWindows, SpatialIntegration, dict[int, torch.Tensor]]:
    torch.manual_seed(0)
    cut = MapWindows(WIDTHS, grid)
    sfi = SpatialIntegration(WIDTHS, {8: 16, 16: 4, 32: 1}, width)
    for p in sfi.parameters():
        torch.nn.init.normal_(p, std=0.5)
    maps = {s: torch.randn(3, c, 64 // s, 64 // s) for s, c in WIDTHS.items()}
    return cut, sfi, maps


def test_folded_projections_equal_window_attention_with_projected_keys_and_values() -> None:
    cut, sfi, maps = build()
    x = torch.randn(3, 4, 12)
    windows = cut(maps)
    fast = sfi(x, windows)
    q = sfi.query(sfi.norm(x))  # [B, N, D]
    slow = x.clone()
    for b in range(3):
        for n in range(4):
            keys, values = [], []
            for s in WIDTHS:
                m = windows[s][b, n]  # [K, C]
                keys.append(sfi.keys[str(s)](m) + sfi.places[str(s)])
                values.append(sfi.values[str(s)](m))
            k, v = torch.cat(keys), torch.cat(values)  # [21, D]
            slow[b, n] += ((k @ q[b, n]) / math.sqrt(12)).softmax(0) @ v
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_a_query_sees_only_its_own_window() -> None:
    cut, sfi, maps = build()
    x = torch.randn(3, 4, 12)
    before = sfi(x, cut(maps))
    maps[8][:, :, :4, :4] += 3 * torch.randn(3, 5, 4, 4)  # the upper left window of the finest map
    changed = (sfi(x, cut(maps)) - before).abs().amax((0, 2))
    assert changed[0] > 1e-3
    assert torch.all(changed[1:] < 1e-6)


def test_gradients_reach_every_parameter() -> None:
    cut, sfi, maps = build()
    sfi(torch.randn(3, 4, 12), cut(maps)).square().sum().backward()
    for module in (cut, sfi):
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_a_map_that_does_not_divide_into_the_grid_is_refused_by_size() -> None:
    with pytest.raises(ValueError, match="3x8"):
        MapWindows({8: 5}, 2).cut(torch.zeros(1, 5, 3, 8))
