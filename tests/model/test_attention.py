"""One attention function: the fused backend against the plain one, rotary positions, the cache."""

from __future__ import annotations

import pytest
import torch

from model_server.model.attention import Backend, KVCache, attend, rotary_table, rotate


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_backend_equals_the_float32_reference(groups: int, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 9) > 0.4
        mask[..., 0] = True
    torch.testing.assert_close(
        attend(q, k, v, mask, Backend.SDPA), attend(q, k, v, mask, Backend.MATH), atol=1e-5, rtol=1e-5
    )


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        a, b = (rotate(x, *rotary_table(torch.tensor([[p]]), 16, 10000.0)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(52, 50), atol=1e-4, rtol=1e-4)
    assert abs(float(score(3, 1) - score(3, 2))) > 1e-3


def test_the_cache_returns_what_was_written_and_reorders_rows() -> None:
    cache = KVCache(layers=1, batch=2, heads=1, length=4, width=3, like=torch.zeros(1))
    first, second = torch.randn(2, 1, 2, 3), torch.randn(2, 1, 1, 3)
    cache.write(0, first, first)
    cache.advance(2)
    k, _ = cache.write(0, second, second)
    assert torch.equal(k, torch.cat((first, second), 2))
    cache.advance(1)
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.data.shape[2] == 3
    assert torch.equal(cache.data[0, 0, 0, :, :2], first[1])
    assert torch.equal(cache.data[0, 0, 2, :, :2], first[0])
