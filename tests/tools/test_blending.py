"""A mask made of tiles equals the one made in one piece, and edges of tiles count little."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_tools.errors import ArtifactError
from rs_tools.geometry.blending import Band, Blender
from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.shelf import Shelf
from rs_tools.imagery.tiling import tile_grid

Maps = Callable[[np.ndarray], np.ndarray]


def frames_of(region: tuple[int, int, int, int], side: int, overlap: int, decimation: float = 1) -> list[TileFrame]:
    plan = tile_grid(region, side, overlap, decimation)
    return [TileFrame(one, plan.size(one)) for one in plan.regions]


def blended(frames: list[TileFrame], region: tuple[int, int, int, int], image: np.ndarray, maps: Maps) -> np.ndarray:
    """The blend of a function of the pixels, computed tile by tile; float32 [C, H, W]."""
    return np.concatenate([band.probabilities for band in bands(frames, region, image, maps)], axis=1)


def bands(frames: list[TileFrame], region: tuple[int, int, int, int], image: np.ndarray, maps: Maps) -> Iterator[Band]:
    blender = Blender(frames, region, len(maps(image[:1, :1])))
    for i, frame in enumerate(frames):
        x1, y1, x2, y2 = frame.region
        yield from blender.add(i, maps(image[y1:y2, x1:x2]))


def softmax(image: np.ndarray) -> np.ndarray:
    scores = np.exp(np.stack([np.sin(image * k) for k in (3.1, 7.7, 13.3)]))
    return scores / scores.sum(axis=0)


@settings(deadline=None, max_examples=30)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    side=st.integers(24, 64),
    overlap=st.integers(0, 12),
    corner=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 9),
)
def test_tiles_of_any_function_of_the_pixels_blend_to_what_one_piece_gives(
    width: int, height: int, side: int, overlap: int, corner: tuple[int, int], seed: int
) -> None:
    region = (corner[0], corner[1], corner[0] + width, corner[1] + height)
    image = np.random.default_rng(seed).random((region[3], region[2]))
    tiled = blended(frames_of(region, side, overlap), region, image, softmax)
    whole = blended([TileFrame(region, (width, height))], region, image, softmax)
    np.testing.assert_array_equal(tiled, whole)
    exact = softmax(image[region[1] : region[3], region[0] : region[2]])
    np.testing.assert_allclose(tiled, exact, atol=0.5 / 255 + 1e-6)


@settings(deadline=None, max_examples=20)
@given(level=st.floats(0, 1), decimation=st.floats(1, 5))
def test_a_uniform_answer_stays_uniform_at_any_scale(level: float, decimation: float) -> None:
    region = (3, 5, 203, 155)
    frames = frames_of(region, 32, 8, decimation)
    blender = Blender(frames, region, 1)
    found = [
        band for i, one in enumerate(frames) for band in blender.add(i, np.full((1, one.size[1], one.size[0]), level))
    ]
    probabilities = np.concatenate([band.probabilities for band in found], axis=1)
    assert probabilities.shape == (1, 150, 200)
    assert np.ptp(probabilities) == 0
    assert probabilities[0, 0, 0] == pytest.approx(level, abs=0.5 / 255 + 1e-6)


def test_a_tile_read_at_half_the_scale_is_interpolated_in_its_place() -> None:
    region = (0, 0, 200, 100)
    frames = frames_of(region, 40, 10, 2)
    blender = Blender(frames, region, 1)
    x, y = np.meshgrid(np.arange(200) + 0.5, np.arange(100) + 0.5)
    parts = []
    for i, frame in enumerate(frames):
        own = np.stack(np.meshgrid(np.arange(frame.size[0]) + 0.5, np.arange(frame.size[1]) + 0.5), axis=-1)
        scene = frame.to_scene(own)
        parts += [band.probabilities for band in blender.add(i, (scene[..., 0] + scene[..., 1])[None] / 400)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[0], (x + y) / 400, atol=0.01)


def test_tiles_may_come_in_any_order() -> None:
    region = (0, 0, 150, 150)
    image = np.random.default_rng(0).random((150, 150))
    frames = frames_of(region, 64, 16)
    backwards = blended(frames[::-1], region, image, softmax)
    np.testing.assert_array_equal(backwards, blended(frames, region, image, softmax))


def test_the_edge_of_a_tile_hardly_counts_against_the_middle_of_another() -> None:
    region = (0, 0, 96, 64)
    frames = [TileFrame((0, 0, 64, 64), (64, 64)), TileFrame((32, 0, 96, 64), (64, 64))]
    blender = Blender(frames, region, 1)
    found = [*blender.add(0, np.zeros((1, 64, 64))), *blender.add(1, np.ones((1, 64, 64)))]
    row = np.concatenate([band.probabilities for band in found], axis=1)[0, 30]
    assert row[31] == 0
    assert row[32] < 0.05
    assert row[63] > 0.95
    assert row[47] == pytest.approx(0.5, abs=0.06)
    assert (np.diff(row) >= 0).all()


def test_a_mask_names_the_likeliest_class_none_and_nodata() -> None:
    region = (0, 0, 4, 1)
    blender = Blender([TileFrame(region, (4, 1))], region, 2)
    probabilities = np.array([[[0.9, 0.2, 0.4, 0.9]], [[0.1, 0.7, 0.3, 0.9]]])
    [band] = blender.add(0, probabilities, np.array([[True, True, True, False]]))
    assert band.mask().tolist() == [[1, 2, 0, 255]]
    assert band.mask(0.3).tolist() == [[1, 2, 1, 255]]


def test_pixels_that_one_tile_knows_and_another_does_not_take_the_one_that_does() -> None:
    region = (0, 0, 96, 64)
    frames = [TileFrame((0, 0, 64, 64), (64, 64)), TileFrame((32, 0, 96, 64), (64, 64))]
    blender = Blender(frames, region, 1)
    found = [*blender.add(0, np.full((1, 64, 64), 0.8))]
    found += blender.add(1, np.zeros((1, 64, 64)), np.zeros((64, 64), bool))
    mask = np.concatenate([band.mask() for band in found])
    assert (mask[:, :64] == 1).all()
    assert (mask[:, 64:] == 255).all()


def test_rows_leave_when_they_are_complete_and_memory_does_not_grow_with_the_height() -> None:
    def peak(height: int) -> tuple[int, int]:
        region = (0, 0, 512, height)
        frames = frames_of(region, 128, 16)
        blender = Blender(frames, region, 2)
        maps = np.full((2, 128, 128), 0.5, np.float32)
        tracemalloc.start()
        rows = sum(len(band.valid) for i in range(len(frames)) for band in blender.add(i, maps))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return rows, used

    (low, small), (high, large) = peak(600), peak(3000)
    assert (low, high) == (600, 3000)
    assert large < 1.2 * small


def test_a_tile_twice_or_of_another_shape_is_refused() -> None:
    region = (0, 0, 8, 8)
    frames = frames_of(region, 4, 0)
    blender = Blender(frames, region, 1)
    blender.add(0, np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="added before"):
        blender.add(0, np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        blender.add(1, np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="classes"):
        Blender(frames, region, 255)


@given(held=st.sampled_from([0, 9_000]))
@settings(deadline=None, max_examples=2)
def test_maps_that_wait_in_a_file_blend_as_those_in_memory_do(held: int) -> None:
    region = (2, 3, 402, 203)
    frames = frames_of(region, 48, 10, 1.7)
    image = np.random.default_rng(1).random((203, 402))
    masks = [np.random.default_rng(i).random(frame.size[::-1]) > 0.2 for i, frame in enumerate(frames)]

    def painted(shelf: Shelf | None) -> np.ndarray:
        blender = Blender(frames, region, 3, shelf)
        maps = (softmax(image[: one.size[1], : one.size[0]]) * (i % 3 + 1) / 3 for i, one in enumerate(frames))
        found = [band for i, one in enumerate(maps) for band in blender.add(i, one, masks[i])]
        return np.concatenate([band.mask(0.3) for band in found])

    with Shelf(held_bytes=held) as shelf:
        np.testing.assert_array_equal(painted(shelf), painted(None))
        assert list(shelf) == []


def test_a_file_of_waiting_maps_does_not_grow_with_the_scenes_height(tmp_path: Path) -> None:
    def written(height: int) -> int:
        region = (0, 0, 256, height)
        frames = frames_of(region, 64, 8)
        with Shelf(tmp_path, held_bytes=0) as shelf:
            blender = Blender(frames, region, 2, shelf)
            maps = np.full((2, 64, 64), 9, np.uint8)
            rows = sum(len(band.valid) for i in range(len(frames)) for band in blender.add(i, maps))
            assert rows == height
            return shelf.file_bytes

    assert written(2000) == written(400) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_waiting_maps_is_said(tmp_path: Path) -> None:
    with Shelf(tmp_path / "gone", held_bytes=0) as shelf, pytest.raises(ArtifactError, match="on the disk"):
        shelf.put(0, np.zeros((4, 2, 4), np.uint8))
