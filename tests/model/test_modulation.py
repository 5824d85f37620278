"""Token-wise modulation: the published numbers, the exact no-op, mixed batches, and what its parts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_server.model.config import ModulationConfig
from model_server.model.modulation import Anchors, TokenModulation

PUBLISHED = ModulationConfig(normalise="twice", span="centres", resize="square")
CASES = (
    "s1_center s1_corner00 s1_corner11 s2_same_position s4_borders s4_corners s6_half_masked s25_grid far_36x36 "
    "nonsquare_12x8 nonsquare_4x12 nonsquare_8x4 bf16_tokens bf16_tokens_bf16_film"
).split()


def trained(**config: Any) -> TokenModulation:
    """For tokens of 8 channels, its last layer no longer zero."""
    torch.manual_seed(0)
    module = TokenModulation(ModulationConfig(**config), 8)
    torch.nn.init.normal_(list(module.parameters())[-2], std=0.1)
    return module


def some_anchors(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 64, generator=generator), torch.rand(count, 2, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_the_published_calculation_is_reproduced(oracles: Path, case: str) -> None:
    folder = oracles / "fusar" / "a"
    inputs, outputs = (load_file(folder / f"tlm_{kind}.safetensors") for kind in ("inputs", "cases"))
    module = TokenModulation(PUBLISHED, 32)
    state = load_file(folder / "tlm_state.safetensors")
    module.load_state_dict({name.replace("film_mlp.", "film."): tensor for name, tensor in state.items()})
    if case == "bf16_tokens_bf16_film":
        module = module.bfloat16()
    given = {name: inputs[f"{case}.{name}"] for name in ("tokens", "grid_thw", "vec64_seq", "vec64_pos", "vec64_mask")}
    anchors = Anchors(given["vec64_seq"], given["vec64_pos"], given["vec64_mask"])
    grid = int(given["grid_thw"][0, 1]), int(given["grid_thw"][0, 2])
    weights = module.weights(grid, anchors.positions[0], anchors.mask[0]).flatten(1).T
    torch.testing.assert_close(weights, outputs[f"{case}.weights_final_HWxS"], atol=1e-5, rtol=0)
    with torch.no_grad():
        found = module(given["tokens"], [grid], anchors)
    assert found.dtype == given["tokens"].dtype
    # Half precision may differ by a rounding step from one processor to another.
    atol, rtol = (1e-5, 0.0) if found.dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(found, outputs[f"{case}.output"], atol=atol, rtol=rtol)


def test_an_untrained_module_changes_nothing_and_still_learns() -> None:
    module = TokenModulation(ModulationConfig(), 8)
    x = torch.randn(16, 8)
    found = module(x, [(8, 8)], Anchors.of([some_anchors(3)], 64))
    assert torch.equal(found, x)
    found.square().sum().backward()
    grads = [parameter.grad for parameter in module.parameters()][-2:]  # of the last layer
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_images_without_anchors_keep_their_tokens_bit_for_bit() -> None:
    module = trained()
    x = torch.randn(48, 8)
    x[0, 0] = -0.0
    grids = [(8, 8)] * 3
    found = module(x, grids, Anchors.of([None, some_anchors(2), None], 64))
    for rows in (slice(0, 16), slice(32, 48)):
        assert torch.equal(found[rows].view(torch.int32), x[rows].view(torch.int32))
    assert not torch.equal(found[16:32], x[16:32])
    assert module(x, grids, None) is x
    assert module(x, grids, Anchors.of([None] * 3, 64)) is x


@pytest.mark.parametrize("published", [False, True])
def test_a_mixed_batch_equals_each_image_alone(published: bool) -> None:
    module = trained(**vars(PUBLISHED)) if published else trained()
    grids = [(8, 8), (4, 10), (6, 2), (8, 8)]
    images = [some_anchors(5, 1), None, some_anchors(1, 2), some_anchors(2, 3)]
    counts = [16, 10, 3, 16]
    x = torch.randn(sum(counts), 8)
    together = module(x, grids, Anchors.of(images, 64)).split(counts)
    for tokens, grid, image, found in zip(x.split(counts), grids, images, together, strict=True):
        torch.testing.assert_close(found, module(tokens, [grid], Anchors.of([image], 64)), atol=1e-6, rtol=1e-6)


def test_weights_sum_to_one_near_anchors_and_vanish_far_away() -> None:
    module = trained()
    anchors = Anchors.of([(torch.zeros(2, 64), torch.tensor([[0.02, 0.02], [0.05, 0.05]]))], 64)
    total = module.weights((36, 36), anchors.positions[0], anchors.mask[0]).sum(0)
    torch.testing.assert_close(total[:5, :5], torch.ones(5, 5), atol=1e-4, rtol=0)
    assert total[-1, -1] == 0


@pytest.mark.parametrize("grid", [(8, 8), (8, 4), (4, 12)])
def test_an_anchor_works_where_it_stands_whatever_the_shape_of_the_image(grid: tuple[int, int]) -> None:
    module = trained(sigma=0.5)
    rows, columns = grid[0] // 2, grid[1] // 2
    for row in range(rows):
        for column in range(columns):
            place = torch.tensor([[(row + 0.5) / rows, (column + 0.5) / columns]])
            x = torch.ones(rows * columns, 8)
            change = (module(x, [grid], Anchors.of([(torch.ones(1, 64), place)], 64)) - x).norm(dim=1)
            assert int(change.argmax()) == row * columns + column


def test_padding_does_not_weaken_real_anchors() -> None:
    module = trained()
    vectors, places = some_anchors(1)
    alone = Anchors.of([(vectors, places)], 64)
    parts = (alone.vectors, alone.positions, alone.mask)
    padded = Anchors(*(torch.cat((part, torch.zeros_like(part)), 1) for part in parts))
    x = torch.randn(16, 8)
    torch.testing.assert_close(module(x, [(8, 8)], padded), module(x, [(8, 8)], alone), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "grid"), [(16, (8, 6)), (12, (8, 7)), (0, (0, 0))])
def test_tokens_that_do_not_fit_the_grid_are_refused(tokens: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"grid"):
        trained()(torch.randn(tokens, 8), [grid], Anchors.of([some_anchors(1)], 64))


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"normalise": "thrice"}, {"span": ""}, {"resize": "cubic"}])
def test_an_unknown_form_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ModulationConfig(**wrong)
