"""Files of answers at the terminal: put where the caller wants them, under names that tell what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rasterio
from planted import BLUE, RED, PlantedModel, painted
from rasters import UTM, write
from typer.testing import CliRunner

from rs_tools import cli


class Client(PlantedModel):
    async def aclose(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, and a model that sees what is painted."""
    monkeypatch.setattr(cli, "ModelClient", Client)
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(tmp_path / "state"))
    place: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633", "transform": UTM}
    write(tmp_path / "bay.tif", painted(80, 90, ((10, 10, 20, 15), RED)), **place)
    write(tmp_path / "bay_2.tif", painted(80, 90, ((40, 40, 60, 60), BLUE)), **place)
    return tmp_path


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_files_lie_in_the_folder_that_is_named_and_the_answer_names_them(folder: Path) -> None:
    out = folder / "out"
    run("ground", folder / "bay.tif", "ship", "--out", out)
    run("segment", folder / "bay_2.tif", "--class", "water", "--preview", "--out", out)
    answer = json.loads(run("detect-change", folder / "bay.tif", folder / "bay_2.tif", "--out", out, "--json"))
    assert sorted(path.name for path in out.iterdir() if not path.name.endswith(".aux.xml")) == [
        "bay-bay_2-change.geojson",
        "bay-bay_2-change.tif",
        "bay-ground.geojson",
        "bay_2-segment.geojson",
        "bay_2-segment.png",
        "bay_2-segment.tif",
    ]
    assert [Path(one["path"]).parent for one in answer["artifacts"]] == [out, out]
    with rasterio.open(out / "bay_2-segment.tif") as file:
        assert (file.read(1) == 1).sum() == 400
        assert file.tags(1)["CLASS_1"] == "water"


def test_without_a_folder_the_answer_says_where_its_files_are_kept(folder: Path) -> None:
    output = run("ground", folder / "bay.tif", "ship")
    assert "1 found for 'ship': [10, 10, 20, 15] score 0.90" in output
    [vectors] = (folder / "state" / "artifacts").iterdir()
    assert vectors.name in output.replace("\n", "")


def test_a_folder_that_cannot_be_made_gives_status_1_and_the_reason(folder: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["ground", str(folder / "bay.tif"), "ship", "--out", str(folder / "bay.tif" / "out")]
    )
    assert done.exit_code == 1
    assert "cannot be put into" in done.stderr
