"""AlphaEarth embeddings from a tool's argument to the modulation of a FUSAR-type model, over a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from processes import picture, server_process
from rasterio.transform import from_origin

from model_server.protocol import (
    ANCHOR_VALUES,
    UNUSED_ANCHORS,
    PerceiveRequest,
    WireError,
    decode_request,
    encode_request,
)
from rs_tools.client import ModelClient
from rs_tools.errors import AccessError, ImageError, InputError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.results import ClassifyResult
from rs_tools.tools import Tools

LABELS = ["forest", "harbor", "river"]
LEFT, TOP = 550_000, 4_180_000


def raster(path: Path, values: np.ndarray, step: float, left: float = LEFT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {"crs": "EPSG:32610", "transform": from_origin(left, TOP, step, step)}
    bands, height, width = values.shape
    with rasterio.open(path, "w", "GTiff", width, height, bands, dtype=values.dtype.name, **profile) as file:
        file.write(values)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scene of 112 pixels of 10 m, embeddings of its place in two years, and some of another place."""
    raster(tmp_path / "scene_20240513.tif", np.moveaxis(picture(3, 112), -1, 0), 10)
    known = np.random.default_rng(0).integers(-127, 128, (64, 30, 30)).astype(np.int8)
    raster(tmp_path / "annual/2024/10N/here.tif", known, 40)
    raster(tmp_path / "annual/2021/10N/here.tif", known[:, ::-1], 40)
    raster(tmp_path / "elsewhere.tif", known, 40, LEFT + 50_000)
    raster(tmp_path / "few_bands.tif", known[:8], 40)
    return tmp_path


def test_embeddings_change_the_answer_and_without_them_it_is_exactly_what_it_was(
    folder: Path, oracles: Path, tmp_path: Path
) -> None:
    with server_process(tmp_path / "log", "--weights", str(oracles / "fusar" / "a")) as server:
        server.wait_until_ready()
        results = asyncio.run(asked(server.url, folder))
    plain, known, again, other = results
    assert scores(plain) == scores(again)
    assert len({scores(plain), scores(known), scores(other)}) == 3
    assert any("none came with this image" in warning for warning in plain.warnings)
    assert not any("none came" in warning or "name says" in warning for warning in known.warnings)
    assert plain.provenance.embeddings == ""
    assert known.provenance.embeddings == "here.tif (2024)"
    assert "The image's name says 2024; the embeddings are of 2021." in other.warnings


async def asked(url: str, folder: Path) -> list[ClassifyResult]:
    """The scene's class: without embeddings, with those of 2024, without again, with those of 2021."""
    async with ModelClient(url) as client:
        tools = Tools(AccessPolicy([folder]), client)
        given = ["", "annual/2024", "", "annual/2021/10N/here.tif"]
        return [await tools.classify("scene_20240513.tif", LABELS, embeddings=one) for one in given]


def scores(result: ClassifyResult) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((one.label, one.score) for one in result.top))


def test_a_model_without_modulation_says_that_it_did_not_use_them(folder: Path, tmp_path: Path) -> None:
    with server_process(tmp_path / "log") as server:
        server.wait_until_ready()
        plain, known, *_ = asyncio.run(asked(server.url, folder))
    assert scores(plain) == scores(known)
    assert UNUSED_ANCHORS in known.warnings
    assert UNUSED_ANCHORS not in plain.warnings


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ("annual", InputError, r"several years \(2021, 2024\).*annual/2024"),
        ("annual/2023", AccessError, "annual/2023"),
        ("elsewhere.tif", ImageError, r"no embedding at the region's place \(its middle is -122\.\d+ E, 37\.\d+ N\)"),
        ("few_bands.tif", ImageError, "8 bands of int8; 64 bands A00 to A63"),
        ("scene_20240513.tif", ImageError, "3 bands of uint8; 64 bands"),
    ],
)
def test_misuse_is_said_before_a_model_is_asked(folder: Path, given: str, kind: type[Exception], says: str) -> None:
    tools = Tools(AccessPolicy([folder]), ModelClient("http://127.0.0.1:9"))
    with pytest.raises(kind, match=says):
        asyncio.run(tools.ground("scene_20240513.tif", "ship", embeddings=given))


def test_anchors_go_over_the_wire_as_they_are() -> None:
    tiles = [picture(1, 8), picture(2, 8)]
    some = np.random.default_rng(0).random((3, ANCHOR_VALUES), np.float32)
    anchors = [some, some[:0]]
    request, back = decode_request(encode_request(PerceiveRequest(task="caption", anchors=anchors), tiles))
    assert all(np.array_equal(a, b) for a, b in zip(anchors, request.anchors, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(tiles, back, strict=True))
    assert decode_request(encode_request(PerceiveRequest(task="caption"), tiles))[0].anchors == []


@pytest.mark.parametrize(
    ("task", "anchors", "says"),
    [
        ("caption", [np.zeros((1, 66), np.float32)], "every tile or for none: anchors_1"),
        ("caption", [np.zeros((1, 64), np.float32)] * 2, r"anchors_0 must be float32 \[S, 66\]"),
        ("caption", [np.zeros((1, 66), np.float64)] * 2, r"it is float64 \[1, 66\]"),
        ("caption", [np.full((1, 66), 2, np.float32)] * 2, "within 0 and 1"),
        ("detect_change", [np.zeros((1, 66), np.float32)] * 2, "takes none"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(task: Any, anchors: list[np.ndarray], says: str) -> None:
    body = encode_request(PerceiveRequest(task=task, anchors=anchors), [picture(1, 8), picture(2, 8)])
    with pytest.raises(WireError, match=says):
        decode_request(body)
