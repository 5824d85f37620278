"""Small rasters that tests write, and a model client that answers from a script."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import Affine

from model_server.protocol import (
    ModelInfo,
    PerceiveRequest,
    PerceiveResponse,
    RankedAnswer,
    TileCaption,
    TileClasses,
    TileVqa,
)
from rs_tools.errors import NotServed
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Pixels, Scene
from rs_tools.results import Artifact

REPOSITORY = Path(__file__).parents[2]
BUNDLED = REPOSITORY / "examples" / "data"
DATA = Path(os.environ.get("RS_DATA", REPOSITORY.parent / "shared" / "data"))
TASK_TOKENS = {
    "caption": "[CAP]",
    "vqa": "[VQA]",
    "classify": "[CLS]",
    "ground": "[VG]",
    "segment": "[SEG]",
    "detect_change": "[CCD]",
}
UTM = Affine(10, 0, 400_000, 0, -10, 5_000_000)


def write(
    path: Path,
    values: np.ndarray,
    *,
    colors: list[str] | None = None,
    descriptions: list[str] | None = None,
    mask: np.ndarray | None = None,
    colormap: dict[int, tuple[int, ...]] | None = None,
    **profile: Any,
) -> Path:
    """A raster of `values` [C, H, W] at `path`; GeoTIFF unless `driver` says otherwise."""
    count, height, width = values.shape
    profile = {"driver": "GTiff", "dtype": values.dtype.name, **profile}
    # A mask that is not told to be internal would become a file of its own.
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", width=width, height=height, count=count, **profile) as file,
    ):
        file.write(values)
        if colors:
            file.colorinterp = [ColorInterp[color] for color in colors]
        if descriptions:
            file.descriptions = descriptions
        if mask is not None:
            file.write_mask(mask)
        if colormap:
            file.write_colormap(1, colormap)
    return path


def noise(count: int, height: int, width: int, dtype: str = "uint8", low: int = 1, high: int = 255) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (count, height, width)).astype(dtype)


def opened(path: Path, bands: tuple[int, ...] = ()) -> Scene:
    return Scene.open(AccessPolicy([path.parent]), str(path), bands)


def whole(scene: Scene, out_size: tuple[int, int] | None = None) -> Pixels:
    return scene.read(scene.region([]), out_size or (scene.width, scene.height))


def rational() -> RPC:
    """Rational polynomial coefficients of no place in particular."""
    below, above = [1.0] + [0.0] * 19, [0.1] * 20
    values: dict[str, Any] = {  # a dictionary, as rasterio's class hides its parameters from type checkers
        "height_off": 0, "height_scale": 100, "lat_off": 50, "lat_scale": 1, "long_off": 10, "long_scale": 1,
        "line_off": 24, "line_scale": 24, "line_num_coeff": above, "line_den_coeff": below,
        "samp_off": 32, "samp_scale": 32, "samp_num_coeff": above, "samp_den_coeff": below,
    }  # fmt: skip
    return RPC(**values)


def features(artifact: Artifact) -> list[dict[str, Any]]:
    """The features of a vectors file."""
    return json.loads(Path(artifact.path).read_text())["features"]


def size(artifact: Artifact) -> int:
    return Path(artifact.path).stat().st_size


class ScriptedClient:
    """Stands for the model server where its answer does not matter; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[PerceiveRequest] = []
        self.tiles: list[np.ndarray] = []

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        if request.task in ("ground", "segment", "detect_change"):
            raise NotServed(f"the loaded model has no part for {request.task}")
        self.requests.append(request)
        self.tiles += tiles
        return scripted_answer(request, len(tiles))


def scripted_answer(request: PerceiveRequest, tiles: int) -> PerceiveResponse:
    labels = request.labels or ["forest", "harbour", "river"]
    scores = np.arange(1, len(labels) + 1) / np.arange(1, len(labels) + 1).sum()
    vqa = TileVqa(
        answer="yes",
        kind="yes_no",
        confidence=0.9,
        abstained=False,
        alternatives=[RankedAnswer(answer="no", confidence=0.1)],
    )
    return PerceiveResponse(
        captions=[TileCaption(caption="A river.", confidence=0.7)] * tiles if request.task == "caption" else [],
        vqa=[vqa] * tiles if request.task == "vqa" else [],
        classes=[TileClasses(labels=labels, scores=scores.tolist())] * tiles if request.task == "classify" else [],
        model=ModelInfo(
            model="scripted", weights_digest="sha256:0", attention_backend="math", precision="float32", device="cpu"
        ),
        task_token=TASK_TOKENS[request.task],
        expert="image",
        warnings=["the model has something to say"],
        elapsed_s=0.01,
    )
