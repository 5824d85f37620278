"""A real `rs-mcp` in front of a real `rs-model-server` with a tiny checkpoint, over both transports."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from http_processes import running_service
from mcp import Client
from mcp_models import PlantedModel
from mcp_processes import (
    TOKEN,
    Connect,
    ModelServer,
    running_model_server,
    stdio,
)

import mcp_server
from rs_tools.imagery.access import AccessPolicy

SCENES = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture(scope="session")
def model_server(dense_weights: Path, token_file: Path) -> Iterator[ModelServer]:
    with running_model_server(dense_weights, token_file) as server:
        yield server


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of answers go, and not to the user's cache."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def local_state(tmp_path: Path) -> Iterator[Path]:
    """A state folder of the test's own, whose model server ends with the test."""
    state = tmp_path / "state"
    yield state
    for file in state.glob("server-*.json"):
        os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder that the server may read: a real scene, and files that only look like one."""
    folder = tmp_path_factory.mktemp("root")
    scene = SCENES / "itaipu_landsat8.tif"
    shutil.copy(scene, folder)
    shutil.copy(SCENES / "yellowstone_road.jpg", folder)
    shutil.copy(SCENES / "raleigh_landsat7.tif", folder)
    (folder / "notes.tif").write_text("A text file with the name of a raster.\n")
    (folder / "truncated.tif").write_bytes(scene.read_bytes()[:400_000])
    return folder


@pytest.fixture(scope="session")
def http_server(
    model_server: ModelServer, token_file: Path, root: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of one `rs-mcp --http` for all tests."""
    arguments = ["--root", str(root), "--model-url", model_server.url, "--token-file", str(token_file)]
    arguments += ["--artifacts", str(artifacts)]
    with running_service(tmp_path_factory.mktemp("service"), *arguments) as service:
        yield f"{service.url}/mcp"


@pytest.fixture(params=["stdio", "http"])
def connect(
    request: pytest.FixtureRequest, model_server: ModelServer, token_file: Path, root: Path, artifacts: Path
) -> Connect:
    """Opens a client of a real `rs-mcp`; keywords go to `mcp.Client`. Each test runs over both transports."""
    if request.param == "http":
        url: str = request.getfixturevalue("http_server")
        return lambda **options: Client(url, **options)
    arguments = ["--root", str(root), "--model-url", model_server.url, "--token-file", str(token_file)]
    arguments += ["--artifacts", str(artifacts)]
    return lambda **options: Client(stdio(*arguments), **options)


Serve = Callable[..., Client]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Clients of servers in this process, in front of a model that stands for the model server.

    Takes the folder of images and the model; keywords go to `build_server`. Artifacts get a folder of their own.
    """

    def client(folder: Path, model: object, **options: Any) -> Client:
        monkeypatch.setattr(mcp_server, "ModelClient", lambda *_: model)
        return Client(mcp_server.build_server(AccessPolicy([folder]), artifacts=str(tmp_path / "artifacts"), **options))

    return client


@pytest.fixture
def planted(root: Path, serve: Serve) -> Client:
    """In front of a model that finds everything it is asked for."""
    return serve(root, PlantedModel())


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images, among them each kind that cannot be answered as asked."""
    folder = tmp_path_factory.mktemp("small")
    values = np.random.default_rng(0).integers(1, 255, (3, 48, 64), dtype="uint8")
    here = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 400_000, 0, -10, 5_000_000)}
    away = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 700_000, 0, -10, 5_000_000)}
    _write(folder / "scene.tif", values, photometric="RGB", **here)
    _write(folder / "later.tif", values[:, ::-1].copy(), photometric="RGB", **here)
    _write(folder / "elsewhere.tif", values, photometric="RGB", **away)
    _write(folder / "empty.tif", np.zeros_like(values), photometric="RGB", nodata=0, **here)
    _write(folder / "plain.png", values, driver="PNG")
    _write(folder / "radar.tif", values[:1].astype("float32") / -10, descriptions=["VV"], **here)
    (folder / "notes.tif").write_text("A text file with the name of a raster.\n")
    (folder / "truncated.tif").write_bytes((folder / "scene.tif").read_bytes()[:3000])
    return folder


def _write(path: Path, values: np.ndarray, descriptions: Sequence[str] = (), **profile: Any) -> None:
    bands, height, width = values.shape
    profile = {"driver": "GTiff", "dtype": values.dtype.name, **profile}
    with rasterio.open(path, "w", width=width, height=height, count=bands, **profile) as file:
        file.write(values)
        if descriptions:
            file.descriptions = descriptions
