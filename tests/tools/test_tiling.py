"""Which windows of a region the model is shown."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_tools.imagery.scene import Region
from rs_tools.imagery.tiling import (
    FINEST_GSD_M,
    MAX_PARTS,
    MAX_TILES,
    MODEL_SIDE,
    OVERLAP,
    TILE_SIDE,
    WHOLE_SIDE,
    Looks,
    look_at_whole,
    look_closely,
    look_once,
    single_tile,
    tile_grid,
)


@st.composite
def regions(draw: st.DrawFn, longest: int = 400) -> Region:
    x, y = draw(st.integers(0, 10_000)), draw(st.integers(0, 10_000))
    return x, y, x + draw(st.integers(1, longest)), y + draw(st.integers(1, longest))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, float]:
    """Side, overlap and decimation of a plan."""
    side = draw(st.integers(16, 80))
    return side, draw(st.integers(0, side // 2)), draw(st.floats(1, 8))


@settings(deadline=None, max_examples=50)
@given(regions(), cuts())
def test_every_pixel_is_covered_by_tiles_inside_the_region(region: Region, cut: tuple[int, int, float]) -> None:
    side, overlap, decimation = cut
    plan = tile_grid(region, side, overlap, decimation)
    x1, y1, x2, y2 = region
    seen = np.zeros((y2 - y1, x2 - x1), int)
    for left, top, right, bottom in plan.regions:
        assert x1 <= left < right <= x2
        assert y1 <= top < bottom <= y2
        seen[top - y1 : bottom - y1, left - x1 : right - x1] += 1
    assert seen.min() >= 1
    if overlap == 0:
        assert seen.max() == 1
    assert len(plan.regions) == plan.columns * plan.rows


@settings(deadline=None, max_examples=50)
@given(regions(), cuts())
def test_neighbours_share_the_overlap_that_was_asked_for(region: Region, cut: tuple[int, int, float]) -> None:
    side, overlap, decimation = cut
    plan = tile_grid(region, side, overlap, decimation)
    assert plan.overlap >= overlap
    for row in range(plan.rows):
        for column in range(1, plan.columns):
            before, after = plan.regions[row * plan.columns + column - 1], plan.regions[row * plan.columns + column]
            assert before[2] - after[0] >= plan.overlap
    for index in range(plan.columns, len(plan.regions)):
        assert plan.regions[index - plan.columns][3] - plan.regions[index][1] >= plan.overlap


@settings(deadline=None, max_examples=50)
@given(regions(), cuts())
def test_tiles_are_never_larger_than_asked_nor_enlarged(region: Region, cut: tuple[int, int, float]) -> None:
    side, overlap, decimation = cut
    plan = tile_grid(region, side, overlap, decimation)
    for one in plan.regions:
        width, height = plan.size(one)
        assert 1 <= width <= min(side, one[2] - one[0])
        assert 1 <= height <= min(side, one[3] - one[1])
        assert width <= plan.tile_size[0]
        assert height <= plan.tile_size[1]


@settings(deadline=None, max_examples=50)
@given(regions(), cuts())
def test_a_partition_has_no_slivers(region: Region, cut: tuple[int, int, float]) -> None:
    side, _, decimation = cut
    plan = tile_grid(region, side, 0, decimation)
    widths = [right - left for left, _, right, _ in plan.regions]
    heights = [bottom - top for _, top, _, bottom in plan.regions]
    assert max(widths) - min(widths) <= 1
    assert max(heights) - min(heights) <= 1


@settings(deadline=None, max_examples=50)
@given(regions(120_000), st.sampled_from([None, 0.05, 0.3, 10.0]), st.booleans(), st.sampled_from([0, OVERLAP]))
def test_the_work_is_bounded_and_known_beforehand(
    region: Region, gsd: float | None, overview: bool, overlap: int
) -> None:
    for looks, most in (
        (look_closely(region, gsd, overview=overview, overlap=overlap), MAX_TILES),
        (look_at_whole(region, gsd), MAX_PARTS),
    ):
        parts = looks.parts.columns * looks.parts.rows if looks.parts else 0
        assert len(looks.windows) == parts + (looks.overview is not None)
        assert parts <= most
        assert bool(looks.coarsened) == (looks.coarsened > most)


@settings(deadline=None, max_examples=50)
@given(regions(TILE_SIDE), st.sampled_from([None, 0.05, 10.0]))
def test_a_small_region_is_one_look_whatever_is_asked(region: Region, gsd: float | None) -> None:
    once = Looks(single_tile(region))
    assert look_once(region) == once
    assert look_at_whole(region, gsd) == once
    assert look_closely(region, gsd, overview=False, overlap=OVERLAP) == once
    assert once.windows == [(region, (region[2] - region[0], region[3] - region[1]))]


def test_details_are_looked_at_in_full_resolution() -> None:
    looks = look_closely((0, 0, 2000, 1500), None, overview=False, overlap=0)
    assert looks.overview is None
    assert looks.finest.decimation == 1
    assert (looks.finest.columns, looks.finest.rows, looks.coarsened) == (8, 6, 0)


def test_a_very_fine_image_is_shown_no_finer_than_the_model_knows() -> None:
    looks = look_closely((0, 0, 6000, 6000), 0.1, overview=False, overlap=0)
    assert looks.finest.decimation == pytest.approx(FINEST_GSD_M / 0.1)
    assert look_closely((0, 0, 700, 700), 0.1, overview=True, overlap=0) == look_once((0, 0, 700, 700))


def test_a_caption_of_a_middling_region_needs_no_parts() -> None:
    region = (0, 0, WHOLE_SIDE, 900)
    assert look_at_whole(region, None) == look_once(region)
    assert look_at_whole((0, 0, WHOLE_SIDE + 1, 900), None).parts is not None


def test_beyond_the_budget_tiles_become_coarser_and_the_plan_says_so() -> None:
    looks = look_closely((0, 0, 20_000, 20_000), None, overview=True, overlap=0)
    assert looks.coarsened == math.ceil(20_000 / MODEL_SIDE) ** 2
    assert MAX_TILES * 0.8 <= len(looks.windows) - 1 <= MAX_TILES
    assert looks.finest.decimation == pytest.approx(20_000 / MODEL_SIDE / 20, rel=0.06)


def test_the_whole_is_looked_at_once_and_in_parts_between_overview_and_full_resolution() -> None:
    looks = look_at_whole((0, 0, 10_000, 10_000), None)
    assert looks.overview == single_tile((0, 0, 10_000, 10_000))
    assert looks.parts is not None
    assert looks.parts.decimation == pytest.approx(math.sqrt(10_000 / MODEL_SIDE))
    assert looks.parts.overlap == 0
    assert looks.windows[0] == ((0, 0, 10_000, 10_000), (TILE_SIDE, TILE_SIDE))
    assert 30 <= len(looks.parts.regions) <= 50


@pytest.mark.parametrize(("side", "overlap", "decimation"), [(4, 4, 1.0), (4, -1, 1.0), (4, 0, 0.5)])
def test_impossible_tiles_are_refused(side: int, overlap: int, decimation: float) -> None:
    with pytest.raises(ValueError, match="no tiles"):
        tile_grid((0, 0, 9, 9), side, overlap, decimation)
