"""The tools on real files; the model's words come from a script, for what it says does not matter here."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pyproj import Geod
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasters import BUNDLED, UTM, ScriptedClient, noise, scripted_answer, write

from model_server.protocol import MAX_LABEL_LENGTH, MAX_LABELS, MAX_TEXT, PerceiveRequest, PerceiveResponse
from rs_tools.errors import AccessError, ImageError, InputError, RegionError, ServerBusy, ServerError
from rs_tools.imagery.access import AccessPolicy, Source
from rs_tools.imagery.formats import ByteSource
from rs_tools.inspecting import MAX_LISTED
from rs_tools.tools import Tools


@pytest.fixture
def client() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def tools(tmp_path: Path, client: ScriptedClient) -> Tools:
    """Tools over a folder with a small georeferenced picture, `a.tif`, whose left half is nodata."""
    values = noise(3, 60, 80, low=10)
    values[:, :, :40] = 0
    write(tmp_path / "a.tif", values, photometric="RGB", nodata=0, crs="EPSG:32633", transform=UTM)
    return Tools(AccessPolicy([tmp_path]), client)


# --- what the answers say


async def test_inspecting_tells_size_bands_place_and_kind(tools: Tools, client: ScriptedClient) -> None:
    found = await tools.inspect_image("a.tif")
    assert (found.width, found.height, found.band_count, found.dtype, found.nodata) == (80, 60, 3, "uint8", 0)
    assert [band.color for band in found.bands] == ["red", "green", "blue"]
    assert (found.epsg, found.georeferenced, found.modality) == (32633, True, "optical")
    assert found.gsd_m == pytest.approx(10, rel=0.01)
    assert found.bounds_wgs84 == pytest.approx([13.72, 45.14, 13.73, 45.15], abs=0.02)
    assert found.area_km2 == pytest.approx(0.8 * 0.6, rel=0.002)  # UTM stretches by less
    assert found.crs_wkt is not None
    assert found.provenance.image_digest.startswith("sha256:")
    assert client.requests == []


async def test_nodata_that_is_not_a_number_is_told_by_name(tools: Tools, tmp_path: Path) -> None:
    write(tmp_path / "nan.tif", np.ones((1, 4, 4), "float32"), nodata=float("nan"))
    assert (await tools.inspect_image("nan.tif")).nodata == "nan"


async def test_an_answer_says_what_it_was_made_with(tools: Tools) -> None:
    answer = await tools.caption("a.tif", [40, 0, 80, 60])
    made = answer.provenance
    assert (made.model, made.weights_digest, made.task_token, made.expert) == (
        "scripted",
        "sha256:0",
        "[CAP]",
        "image",
    )
    assert (made.attention_backend, made.precision) == ("math", "float32")
    assert (made.bands, made.stretch) == ([1, 2, 3], "none")
    assert made.image_digest == (await tools.inspect_image("a.tif")).provenance.image_digest
    assert made.tile_grid is not None
    assert made.tile_grid.model_dump() == {
        "columns": 1,
        "rows": 1,
        "tile_width": 40,
        "tile_height": 60,
        "decimation": 1,
        "overlap": 0,
        "overview": False,
    }
    assert made.elapsed_s > 0
    assert answer.warnings == ["the model has something to say"]
    assert answer.georeferenced


async def test_a_caption_is_the_models_sentence(tools: Tools, client: ScriptedClient) -> None:
    answer = await tools.caption("a.tif", detail="full")
    assert (answer.caption, answer.confidence, answer.parts) == ("A river.", 0.7, [])
    assert [(request.task, request.detail) for request in client.requests] == [("caption", "full")]
    assert client.requests[0].gsd_m == pytest.approx(10, rel=0.01)


async def test_the_model_is_told_the_pixel_size_of_the_region_and_not_of_the_whole_image(
    tools: Tools, client: ScriptedClient, tmp_path: Path
) -> None:
    world = Affine(0.5, 0, -180, 0, -0.5, 90)
    write(tmp_path / "world.tif", noise(3, 360, 720), photometric="RGB", crs="EPSG:4326", transform=world)
    await tools.caption("world.tif", region=[300, 40, 380, 60])  # about 65 degrees north
    across = Geod(ellps="WGS84").inv(0, 65, 0.5, 65)[2]
    down = Geod(ellps="WGS84").inv(0, 64.75, 0, 65.25)[2]
    assert client.requests[0].gsd_m == pytest.approx((across * down) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("beside", ["a.pgw", "a.png.aux.xml"])
async def test_what_is_put_beside_an_image_counts_from_the_next_call_on(
    tools: Tools, tmp_path: Path, beside: str
) -> None:
    """A warning says that a place is missing; the user gives one, as GDAL does beside a PNG."""
    write(tmp_path / "a.png", noise(3, 20, 30), driver="PNG")
    assert (await tools.inspect_image("a.png")).provenance.placement == ""
    world = "10\n0\n0\n-10\n400000\n5000000\n"
    transform = "<PAMDataset><GeoTransform>400000, 10, 0, 5000000, 0, -10</GeoTransform></PAMDataset>"
    (tmp_path / beside).write_text(world if beside.endswith("pgw") else transform)
    answer = await tools.caption("a.png")
    assert any("only a grid" in warning for warning in answer.warnings)
    assert answer.provenance.placement != ""


async def test_an_answer_to_a_question_names_its_alternatives_and_where_it_looked(
    tools: Tools, client: ScriptedClient
) -> None:
    answer = await tools.vqa("a.tif", "  Is there\n a river? ", [40, 10, 60, 30])
    assert (answer.answer, answer.kind, answer.confidence, answer.abstained) == ("yes", "yes_no", 0.9, False)
    assert [(other.answer, other.confidence) for other in answer.alternatives] == [("no", 0.1)]
    assert [(part.region, part.answer) for part in answer.evidence] == [([40, 10, 60, 30], "yes")]
    assert client.requests[0].text == "Is there a river?"


async def test_classes_come_best_first_and_at_most_top_k(tools: Tools, client: ScriptedClient) -> None:
    answer = await tools.classify("a.tif", ["sea", " city ", "sea", "field", "wood"], top_k=2)
    assert client.requests[0].labels == ["sea", "city", "field", "wood"]
    assert [found.label for found in answer.top] == ["wood", "field"]
    assert (answer.label, answer.score) == ("wood", answer.top[0].score)


async def test_no_labels_leave_the_classes_to_the_model(tools: Tools, client: ScriptedClient) -> None:
    assert (await tools.classify("a.tif")).label == "river"
    assert client.requests[0].labels == []


# --- what the model sees


async def test_the_model_sees_the_region_with_its_missing_pixels_in_the_mean_colour(
    tools: Tools, client: ScriptedClient, tmp_path: Path
) -> None:
    answer = await tools.caption("a.tif", [20, 0, 80, 60])
    [tile] = client.tiles
    assert tile.shape == (60, 60, 3)
    seen = tile[:, 20:].reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(tile[:, :20], np.broadcast_to(np.rint(seen), (60, 20, 3)))
    assert not any("holds data" in warning for warning in answer.warnings)


async def test_what_only_one_look_at_everything_can_tell_is_told_from_a_reduced_one_and_warns(
    tools: Tools, client: ScriptedClient, tmp_path: Path
) -> None:
    write(tmp_path / "large.tif", noise(3, 1100, 2560), photometric="RGB")
    answer = await tools.vqa("large.tif", "Are there more ships than cars?")
    assert [tile.shape for tile in client.tiles] == [(220, 512, 3)]
    assert any("reduced 5.0-fold" in warning for warning in answer.warnings)
    assert answer.provenance.tile_grid is not None
    assert answer.provenance.tile_grid.decimation == 5


async def test_a_sliver_of_a_region_still_has_a_pixel(tools: Tools, client: ScriptedClient, tmp_path: Path) -> None:
    write(tmp_path / "sliver.tif", noise(3, 2, 4000), photometric="RGB")
    await tools.caption("sliver.tif", [0, 0, 4000, 1])
    assert client.tiles[0].shape == (1, 512, 3)
    assert {tile.shape[0] for tile in client.tiles} == {1}


async def test_degrees_given_as_a_region_are_told_to_be_a_few_pixels_and_which_ones_they_mean(
    tools: Tools, tmp_path: Path
) -> None:
    write(tmp_path / "here.tif", noise(3, 60, 80), photometric="RGB", crs="EPSG:32633", transform=UTM)
    told = "The region is 1 x 1 pixels; regions are in pixels, not in degrees."
    [said] = [
        text for text in (await tools.caption("here.tif", [13.731, 45.142, 13.735, 45.145])).warnings if told in text
    ]
    [region] = re.findall(r"Meant as \[west, south, east, north\] in degrees, it is \[(.+)\]\.", said)
    assert [float(side) for side in region.split(", ")] == pytest.approx([24, 16, 55, 49], abs=2)
    warned = (await tools.caption("here.tif", [13, 45, 16, 47])).warnings
    assert not any("degrees" in text for text in warned)
    write(tmp_path / "dot.tif", noise(3, 1, 1), photometric="RGB")
    assert told not in (await tools.caption("dot.tif")).warnings


async def test_degrees_that_are_no_pixels_are_refused_with_the_pixels_that_they_mean(
    tools: Tools, tmp_path: Path
) -> None:
    west = Affine(0.001, 0, -70, 0, -0.001, -33)
    write(tmp_path / "west.tif", noise(3, 60, 80), photometric="RGB", crs="EPSG:4326", transform=west)
    with pytest.raises(RegionError, match=r"not inside the image.*in degrees, it is \[10, 20, 30, 50\]\."):
        await tools.caption("west.tif", [-69.99, -33.05, -69.97, -33.02])
    with pytest.raises(RegionError, match=r"or nothing for the whole\.$"):
        await tools.caption("west.tif", [-60, -33.05, -59, -33.02])


async def test_explicit_bands_are_what_the_model_sees(tools: Tools, client: ScriptedClient, tmp_path: Path) -> None:
    values = noise(4, 8, 8)
    write(tmp_path / "b.tif", values, photometric="RGB")
    answer = await tools.caption("b.tif", bands=[4, 1, 2])
    np.testing.assert_array_equal(client.tiles[0], values[[3, 0, 1]].transpose(1, 2, 0))
    assert answer.provenance.bands == [4, 1, 2]


# --- when there is little or nothing to see


async def test_a_region_without_data_is_said_to_be_one_and_nobody_guesses(tools: Tools, client: ScriptedClient) -> None:
    region = [0, 0, 40, 60]
    caption = await tools.caption("a.tif", region)
    vqa = await tools.vqa("a.tif", "Is there a river?", region)
    classes = await tools.classify("a.tif", ["sea", "city"], region=region)
    assert "no data" in caption.caption
    assert caption.confidence == 0
    assert "no data" in vqa.answer
    assert (vqa.abstained, vqa.confidence, vqa.alternatives) == (True, 0, [])
    assert (classes.label, classes.score, classes.top) == ("", 0, [])
    for answer in (caption, vqa, classes):
        assert any("no data" in warning for warning in answer.warnings)
        assert answer.provenance.model == ""
    assert client.requests == []


async def test_a_region_with_little_data_warns(tools: Tools) -> None:
    answer = await tools.caption("a.tif", [0, 0, 50, 60])
    assert "Only 20.0% of the region holds data." in answer.warnings


async def test_a_region_of_one_colour_warns(tools: Tools, tmp_path: Path) -> None:
    write(tmp_path / "flat.tif", np.full((3, 9, 9), 7, "uint8"), photometric="RGB")
    assert any("one uniform colour" in warning for warning in (await tools.caption("flat.tif")).warnings)


@pytest.mark.parametrize(
    ("bands", "dtype", "descriptions", "words"),
    [
        (2, "uint8", ["VV", "VH"], "radar"),
        (5, "uint8", ["blue", "green", "red", "nir", "swir"], "multispectral"),
        (1, "float32", ["elevation"], "elevation"),
        (1, "uint8", None, "one grey band"),
    ],
)
async def test_kinds_of_image_that_the_model_did_not_learn_from_warn(
    tools: Tools, tmp_path: Path, bands: int, dtype: str, descriptions: list[str] | None, words: str
) -> None:
    write(tmp_path / "b.tif", noise(bands, 9, 9, dtype), photometric="MINISBLACK", descriptions=descriptions)
    answer = await tools.caption("b.tif")
    assert any(words in warning for warning in answer.warnings)


async def test_an_image_without_crs_gets_an_answer_in_pixels_and_a_warning(tools: Tools, tmp_path: Path) -> None:
    write(tmp_path / "b.png", noise(3, 9, 9), driver="PNG")
    answer = await tools.caption("b.png")
    assert not answer.georeferenced
    assert any("no coordinate reference system" in warning for warning in answer.warnings)
    found = await tools.inspect_image("b.png")
    assert (found.crs_wkt, found.epsg, found.bounds_wgs84, found.gsd_m) == (None, None, None, None)


# --- what is refused


@pytest.mark.parametrize(
    ("question", "message"), [("", "empty"), (" \n", "empty"), ("w" * (MAX_TEXT + 1), f"at most {MAX_TEXT}")]
)
async def test_an_empty_or_over_long_question_is_an_error_with_the_limit(
    tools: Tools, client: ScriptedClient, question: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        await tools.vqa("a.tif", question)
    assert client.requests == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["sea"], "at least two"),
        (["sea", "sea"], "at least two"),
        (["sea", " "], "1 to"),
        ([""], "1 to"),
        (["sea", "x" * (MAX_LABEL_LENGTH + 1)], f"1 to {MAX_LABEL_LENGTH} characters"),
        ([f"class {i}" for i in range(MAX_LABELS + 1)], f"at most {MAX_LABELS}"),
    ],
)
async def test_labels_that_cannot_be_chosen_from_are_an_error_with_the_limit(
    tools: Tools, labels: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        await tools.classify("a.tif", labels)


@pytest.mark.parametrize("top_k", [0, -1, MAX_LABELS + 1])
async def test_top_k_out_of_range_is_an_error_with_the_range(tools: Tools, top_k: int) -> None:
    with pytest.raises(InputError, match=f"1 to {MAX_LABELS}"):
        await tools.classify("a.tif", top_k=top_k)


async def test_an_unknown_detail_is_an_error_with_the_choices(tools: Tools) -> None:
    with pytest.raises(InputError, match="'short' or 'full'"):
        await tools.caption("a.tif", detail="long")  # pyright: ignore[reportArgumentType] (what is tested)


async def test_a_bad_region_or_file_never_reaches_the_model(tools: Tools, client: ScriptedClient) -> None:
    with pytest.raises(RegionError, match="80x60"):
        await tools.caption("a.tif", [0, 0, 81, 60])
    with pytest.raises(AccessError, match="list_images"):
        await tools.caption("absent.tif")
    assert client.requests == []


async def test_a_damaged_file_is_an_error_and_is_read_anew_once_repaired(tools: Tools, tmp_path: Path) -> None:
    whole = (BUNDLED / "itaipu_landsat8.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(whole[:400_000])
    with pytest.raises(ImageError, match=r"b\.tif cannot be read by GTiff"):
        await tools.caption("b.tif")
    (tmp_path / "b.tif").write_bytes(whole)
    assert (await tools.caption("b.tif")).caption == "A river."


async def test_a_replaced_file_is_seen_as_it_is_now(tools: Tools, tmp_path: Path) -> None:
    before = await tools.inspect_image("a.tif")
    write(tmp_path / "a.tif", noise(1, 7, 9))
    after = await tools.inspect_image("a.tif")
    assert (after.width, after.height) == (9, 7)
    assert after.provenance.image_digest != before.provenance.image_digest


async def test_errors_of_the_model_server_reach_the_caller(tmp_path: Path, tools: Tools) -> None:
    class Busy(ScriptedClient):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            raise ServerBusy("try later", 3)

    class Mute(ScriptedClient):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            return scripted_answer(request, 0)

    with pytest.raises(ServerBusy):
        await Tools(AccessPolicy([tmp_path]), Busy()).caption("a.tif")
    with pytest.raises(ServerError, match="did not answer each"):
        await Tools(AccessPolicy([tmp_path]), Mute()).caption("a.tif")


# --- many callers


async def test_rasters_are_read_off_the_event_loop_and_a_known_scene_is_not_described_again(
    tools: Tools, tmp_path: Path, client: ScriptedClient
) -> None:
    threads: list[threading.Thread] = []

    class Watched(AccessPolicy):
        @contextmanager
        def dataset(self, source: Source, file: ByteSource) -> Iterator[DatasetReader]:
            threads.append(threading.current_thread())
            with super().dataset(source, file) as dataset:
                yield dataset

    watched = Tools(Watched([tmp_path]), client)
    await watched.caption("a.tif")
    await watched.caption("./a.tif", [40, 0, 80, 60])
    await watched.inspect_image("a.tif")
    assert len(threads) == 3  # described once, read twice
    assert threading.main_thread() not in threads


async def test_many_callers_of_many_scenes_get_each_their_own_answer(
    tools: Tools, tmp_path: Path, client: ScriptedClient
) -> None:
    for i in range(6):
        write(tmp_path / f"{i}.tif", np.full((3, 20, 20 + i), 10 * i, "uint8"), photometric="RGB")
    answers = await asyncio.gather(*(tools.vqa(f"{i % 6}.tif", "What is it?") for i in range(24)))
    assert [answer.evidence[0].region[2] for answer in answers] == [20 + i % 6 for i in range(24)]


# --- the folder


async def test_listing_tells_readable_images_with_sizes_and_names_those_that_are_not(
    tools: Tools, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.png", noise(1, 5, 6), driver="PNG")
    (tmp_path / "notes.tif").write_text("text")
    (tmp_path / "away.tif").symlink_to(BUNDLED / "itaipu_landsat8.tif")
    found = await tools.list_images()
    assert [Path(image.image).name for image in found.images] == ["a.tif", "b.png"]
    assert (found.images[1].width, found.images[1].height, found.images[1].band_count) == (6, 5, 1)
    assert found.images[1].bytes == (tmp_path / "sub" / "b.png").stat().st_size
    assert found.roots == [str(tmp_path)]
    assert not found.truncated
    assert [warning for warning in found.warnings if "notes.tif is a text file" in warning]
    assert [image.width for image in (await tools.list_images("sub")).images] == [6]
    assert (await tools.inspect_image(found.images[1].image)).width == 6


async def test_a_file_named_in_another_encoding_is_told_and_does_not_end_the_listing(
    tools: Tools, tmp_path: Path
) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.tif")).write_bytes((tmp_path / "a.tif").read_bytes())
    found = await tools.list_images()
    assert [Path(image.image).name for image in found.images] == ["a.tif"]
    assert any("caf" in warning and "not Unicode text" in warning for warning in found.warnings)


async def test_a_long_listing_is_cut_and_says_so(tools: Tools, tmp_path: Path) -> None:
    content = (tmp_path / "a.tif").read_bytes()
    for i in range(MAX_LISTED):
        (tmp_path / f"b{i}.tif").write_bytes(content)
    found = await tools.list_images()
    assert len(found.images) == MAX_LISTED
    assert found.truncated


# --- real scenes


@pytest.mark.parametrize(
    ("name", "georeferenced", "gsd"),
    [
        ("itaipu_landsat8.tif", True, 30),
        ("raleigh_landsat7.tif", True, 28.5),
        ("ordway_swisher_neon.tif", True, 0.1),
        ("yellowstone_road.jpg", False, None),
    ],
)
async def test_bundled_scenes_are_placed_and_answered(
    client: ScriptedClient, name: str, georeferenced: bool, gsd: float | None
) -> None:
    tools = Tools(AccessPolicy([BUNDLED]), client)
    found = await tools.inspect_image(name)
    assert found.georeferenced == georeferenced
    assert found.gsd_m == (pytest.approx(gsd, rel=0.01) if gsd else None)
    await tools.caption(name)
    [tile] = client.tiles
    assert 40 < tile.mean() < 200
    assert tile.std() > 25
