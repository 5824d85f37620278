"""Previews are small whatever they show, and show it in the right place."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from rs_tools.preview import MAX_BYTES, Marked, class_color, render


def seen(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def close(pixels: np.ndarray, color: tuple[int, int, int], by: int = 12) -> np.ndarray:
    return np.abs(pixels - color).max(axis=-1) <= by


def crowd(count: int, width: int, height: int) -> list[Marked]:
    random = np.random.default_rng(0)
    corners = random.uniform(-10, [width - 10, height - 10], (count, 2))
    return [Marked(f"a thing {i % 9}", random.uniform(), [x, y, x + 30, y + 20]) for i, (x, y) in enumerate(corners)]


@pytest.mark.parametrize("size", [(1500, 1100), (2000, 60), (70, 1800), (3, 3), (1, 1)])
def test_noise_under_a_crowd_stays_below_the_limit(size: tuple[int, int]) -> None:
    width, height = size
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = random.choice(np.array([0, 1, 2, 9, 255], np.uint8), (height, width))
    names = {value: f"class number {value} with a long name" for value in range(1, 30)}
    png = render(rgb, (0, 0, width, height), crowd(300, width, height), mask, names, across_m=0.3)
    assert len(png) <= MAX_BYTES
    assert Image.open(io.BytesIO(png)).format == "PNG"


def test_a_box_is_drawn_where_it_lies_in_the_scene() -> None:
    rgb = np.full((300, 400, 3), 90, np.uint8)  # shows scene pixels 1000..1800 x 2000..2600 at half the scale
    pixels = seen(render(rgb, (1000, 2000, 1800, 2600), [Marked("ship", 0.9, [1200, 2200, 1600, 2400])]))
    scale = pixels.shape[1] / 800
    box = close(pixels[: round(600 * scale)], class_color(1))
    y, x = np.nonzero(box)
    assert x.max() / scale == pytest.approx(600, abs=6)
    assert y.max() / scale == pytest.approx(400, abs=6)
    assert box[round(300 * scale), round(200 * scale) : round(200 * scale) + 3].any()
    assert not box[round(300 * scale), round(400 * scale)]


def test_a_mask_tints_its_pixels_only_and_nodata_stays_clear() -> None:
    rgb = np.full((256, 256, 3), 100, np.uint8)
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:64] = 2
    mask[32:96, 64:96] = 255
    pixels = seen(render(rgb, (0, 0, 256, 256), mask=mask, classes={2: "water"}))
    scale = pixels.shape[1] / 256

    def at(x: int, y: int) -> np.ndarray:
        return pixels[round(y * scale), round(x * scale)]

    tinted = 100 + 0.4 * (np.array(class_color(2)) - 100)
    np.testing.assert_allclose(at(96, 128), tinted, atol=12)
    np.testing.assert_allclose(at(160, 128), [100, 100, 100], atol=12)
    np.testing.assert_allclose(at(20, 20), [100, 100, 100], atol=12)


def test_the_scale_bar_is_as_long_as_it_says() -> None:
    rgb = np.full((512, 512, 3), 128, np.uint8)
    pixels = seen(render(rgb, (0, 0, 512, 512), across_m=1.0))
    picture = pixels.shape[1]
    footer = close(pixels[picture:], (245, 245, 245), 30)
    longest = footer.sum(axis=1).max()
    assert longest == pytest.approx(100 * picture / 512, abs=4)  # 100 m is the round length below a quarter
    assert len(pixels) > picture
    assert len(seen(render(rgb, (0, 0, 512, 512)))) == picture  # no size known, no bar


def test_labels_do_not_cover_each_other() -> None:
    from rs_tools.preview import _label_place, _overlap

    taken: list[tuple[float, float, float, float]] = []
    boxes = [one.box for one in crowd(60, 400, 300)]
    for box in boxes:
        place = _label_place((0, 0, 50, 12), box, (400, 300), taken, boxes)
        if place is not None:
            assert 0 <= place[0] < place[2] < 400
            assert 0 <= place[1] < place[3] < 300
            taken.append(place)
    assert len(taken) > 5
    assert not any(_overlap(a, b) for a, b in combinations(taken, 2))


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    xyz = np.clip(linear, 0, 1) @ np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ).T / [0.9505, 1, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_seven_colours_differ_to_the_colour_blind(kind: str) -> None:
    srgb = np.array([class_color(value) for value in range(1, 8)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    found = lab(linear @ np.array(BLINDNESS[kind]).T)
    assert min(np.linalg.norm(a - b) for a, b in combinations(found, 2)) > 10  # 2.3 is just noticeable
    assert class_color(8) == class_color(1)
