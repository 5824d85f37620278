"""Files and many images at the terminal: what is put where, what is said of each image, and the exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rasterio
from planted import BLUE, RED, painted
from planted_server import planted_server
from rasters import UTM, write
from typer.testing import CliRunner, Result

from rs_tools import cli


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with planted_server() as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, in the first a ship, in the second water."""
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    images = tmp_path / "images"
    images.mkdir()
    place: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633", "transform": UTM}
    write(images / "bay.tif", painted(80, 90, ((10, 10, 20, 15), RED)), **place)
    write(images / "bay_2.tif", painted(80, 90, ((40, 40, 60, 60), BLUE)), **place)
    return images


@pytest.fixture
def ask(server: str) -> Any:
    def ask(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli.app, [str(one) for one in [*arguments, "--model-url", server]])

    return ask


def answered(done: Result, status: int = 0) -> str:
    assert done.exit_code == status, done.output
    return done.stdout


def test_files_lie_in_the_folder_that_is_named_and_the_answer_names_them(folder: Path, ask: Any) -> None:
    out = folder / "out"
    answered(ask("ground", folder / "bay.tif", "ship", "--out", out))
    answered(ask("segment", folder / "bay_2.tif", "--class", "water", "--preview", "--out", out))
    change = ask("detect-change", folder / "bay.tif", folder / "bay_2.tif", "--out", out, "--json")
    assert sorted(path.name for path in out.iterdir() if not path.name.endswith(".aux.xml")) == [
        "bay-bay_2-change.geojson",
        "bay-bay_2-change.tif",
        "bay-ground.geojson",
        "bay_2-segment.geojson",
        "bay_2-segment.png",
        "bay_2-segment.tif",
    ]
    assert [Path(one["path"]).parent for one in json.loads(answered(change))["artifacts"]] == [out, out]
    with rasterio.open(out / "bay_2-segment.tif") as file:
        assert (file.read(1) == 1).sum() == 400
        assert file.tags(1)["CLASS_1"] == "water"


def test_a_box_of_an_answer_is_taken_as_the_region_of_the_next_question(folder: Path, ask: Any) -> None:
    found = json.loads(answered(ask("ground", folder / "bay.tif", "ship", "--json")))
    box = found["objects"][0]["bbox_px"]
    assert all(isinstance(side, float) for side in box)
    inside = ["--region", box[0] + 0.25, box[1], *box[2:]]
    again = json.loads(answered(ask("segment", folder / "bay.tif", "--class", "ship", *inside, "--json")))
    assert again["classes"][0]["share"] == 1


def test_a_place_in_degrees_is_the_region_of_every_image_that_shows_it(folder: Path, ask: Any) -> None:
    [ship] = json.loads(answered(ask("ground", folder / "bay.tif", "ship", "--json")))["objects"]
    lon, lat = zip(*ship["polygon_lonlat"], strict=True)
    place = ["--bounds", min(lon), min(lat), max(lon), max(lat)]
    write(folder / "elsewhere.tif", painted(80, 90), photometric="RGB", crs="EPSG:32634", transform=UTM)
    write(folder / "nowhere.tif", painted(80, 90), photometric="RGB")
    lines = answered(ask("segment", folder, "--class", "ship", *place, "--json"), 3).splitlines()
    told = {Path(one["image"]).stem: one for one in map(json.loads, lines)}
    assert told["bay"]["answer"]["classes"][0]["share"] > 0.5  # a pixel more at each edge, for the grid is aslant
    assert told["bay_2"]["answer"]["classes"][0]["share"] == 0
    assert "shows nothing of" in told["elsewhere"]["error"]["message"]
    assert "no known place" in told["nowhere"]["error"]["message"]
    change = ask("detect-change", folder / "bay.tif", folder / "bay_2.tif", *place, "--json")
    assert json.loads(answered(change))["changed_share"] > 0.5


def test_a_region_is_named_in_pixels_or_by_its_place_but_not_by_both(folder: Path, ask: Any) -> None:
    both = ["--region", 0, 0, 9, 9, "--bounds", 14, 45, 15, 46]
    assert "give one of them" in ask("caption", folder / "bay.tif", *both).stderr.replace("\n", " ")


def test_without_a_folder_the_answer_says_where_its_files_are_kept(folder: Path, ask: Any) -> None:
    output = answered(ask("ground", folder / "bay.tif", "ship"))
    assert "1 found for 'ship': [10, 10, 20, 15] score 0.90" in output
    [vectors] = (folder.parent / "state" / "artifacts").iterdir()
    assert vectors.name in output.replace("\n", "")


def test_a_folder_that_cannot_be_made_gives_status_1_and_the_reason(folder: Path, ask: Any) -> None:
    done = ask("ground", folder / "bay.tif", "ship", "--out", folder / "bay.tif" / "out")
    assert done.exit_code == 1
    assert "cannot be put into" in done.stderr


def test_of_a_folder_each_image_is_a_line_of_json_and_one_bad_file_does_not_stop_the_rest(
    folder: Path, ask: Any
) -> None:
    (folder / "bad.tif").write_text("no raster")
    done = ask("ground", folder, "ship", "--json")
    lines = [json.loads(line) for line in answered(done, status=3).splitlines()]
    assert [Path(one["image"]).name for one in lines] == ["bad.tif", "bay.tif", "bay_2.tif"]
    assert lines[0]["error"]["type"] == "ImageError"
    assert "not a raster" in lines[0]["error"]["message"]
    assert [one["answer"]["count"] for one in lines[1:]] == [1, 0]
    assert f"{folder / 'bad.tif'}: " in done.stderr


def test_for_people_each_of_many_answers_stands_below_the_name_of_its_image(folder: Path, ask: Any) -> None:
    lines = answered(ask("ground", folder / "bay.tif", folder / "bay_2.tif", "ship")).splitlines()
    assert lines[0] == str(folder / "bay.tif")
    assert lines[1].startswith("1 found")
    assert str(folder / "bay_2.tif") in lines


@pytest.mark.parametrize(("names", "found"), [(["bay*.tif"], 2), (["*_2.*"], 1), (["bay.tif", "*.tif"], 2)])
def test_patterns_and_names_stand_for_their_files_once_each(
    folder: Path, ask: Any, names: list[str], found: int
) -> None:
    lines = answered(ask("vqa", *(folder / name for name in names), "Is it green?", "--json")).splitlines()
    assert len({json.loads(line)["image"] for line in lines}) == len(lines) == found


def test_when_every_image_is_refused_or_none_is_there_the_status_is_1(folder: Path, ask: Any) -> None:
    assert ask("ground", folder, " ").exit_code == 1
    address = ask("ground", "https://example.org/a.tif", "ship")
    assert (address.exit_code, "download it" in address.stderr) == (1, True)
    nothing = ask("ground", folder / "*.jp2", "ship")
    assert (nothing.exit_code, "No file fits" in nothing.stderr) == (1, True)
    (folder / "empty").mkdir()
    nothing = ask("ground", folder / "empty", "ship")
    assert (nothing.exit_code, "no image in the folder" in nothing.stderr) == (1, True)


def test_a_model_server_that_is_gone_gives_status_4_and_the_rest_is_not_tried(folder: Path) -> None:
    arguments = ["ground", str(folder), "ship", "--model-url", "http://127.0.0.1:9", "--json"]
    done = CliRunner().invoke(cli.app, arguments)
    [line] = done.stdout.splitlines()
    assert json.loads(line)["error"]["type"] == "ServerUnavailable"
    assert done.exit_code == 4


def test_images_of_one_name_in_several_folders_do_not_overwrite_each_others_files(folder: Path, ask: Any) -> None:
    (folder / "later").mkdir()
    (folder / "later" / "bay.tif").write_bytes((folder / "bay_2.tif").read_bytes())
    out = folder.parent / "out"
    answered(ask("ground", folder / "bay.tif", folder / "later" / "bay.tif", "ship", "--out", out))
    assert sorted(one.name for one in out.iterdir()) == ["bay-ground.geojson", "bay_2-ground.geojson"]
    counts = [len(json.loads(one.read_text())["features"]) for one in sorted(out.iterdir())]
    assert counts == [1, 0]


def test_two_folders_are_compared_image_by_image_of_the_same_name(folder: Path, ask: Any) -> None:
    later = folder.parent / "later"
    later.mkdir()
    (later / "bay.tif").write_bytes((folder / "bay_2.tif").read_bytes())
    lines = [json.loads(one) for one in answered(ask("detect-change", folder, later, "--json"), status=3).splitlines()]
    assert [Path(one["before"]).name for one in lines] == ["bay.tif", "bay_2.tif"]
    assert lines[0]["after"] == str(later / "bay.tif")
    assert lines[0]["answer"]["changed"]
    assert lines[1]["error"]["type"] == "AccessError"
    assert ask("detect-change", folder, later / "bay.tif").exit_code == 2


def test_a_token_without_a_server_to_give_it_to_is_wrong_usage(folder: Path) -> None:
    done = CliRunner().invoke(cli.app, ["caption", str(folder / "bay.tif"), "--token-file", str(folder / "bay.tif")])
    assert done.exit_code == 2
    assert "--model-url" in done.stderr
