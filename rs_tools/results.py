"""What the tools answer: closed models, the same for MCP callers, LangChain and scripts.

Pixel coordinates count from the top-left corner of the full-resolution image, x to the right and y down. Geographic
coordinates are lon/lat in WGS84. A `region` is [x1, y1, x2, y2] in pixels, x2 and y2 exclusive. The models refuse
unknown fields, NaN and infinity, and their JSON schemas hold no `$ref`, which some MCP clients cannot follow.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from model_server.protocol import AnswerKind

Modality = Literal["optical", "multispectral", "sar", "elevation", "classified", "grayscale", "unknown"]

SCHEME = "rs-artifact"  # of the URIs of files that belong to answers
MIME_TYPES = {
    ".tif": "application/x-geotiff",
    ".geojson": "application/geo+json",
    ".pixels.json": "application/json",
    ".png": "image/png",
}


class Model(BaseModel):
    """A closed model whose schema is written out in place."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = handler(schema)
        own = handler.resolve_ref_schema(reference)
        own["properties"] = _inlined(own["properties"], handler)
        return reference


def _inlined(node: Any, handler: GetJsonSchemaHandler) -> Any:
    if isinstance(node, list):
        return [_inlined(item, handler) for item in node]
    if not isinstance(node, dict):
        return node
    target = handler.resolve_ref_schema(node) if "$ref" in node else {}
    return target | {key: _inlined(value, handler) for key, value in node.items() if key != "$ref"}


class TileGrid(Model):
    columns: int = Field(description="tiles across the region")
    rows: int = Field(description="tiles down the region")
    tile_width: int = Field(description="width in pixels of a tile as the model saw it")
    tile_height: int = Field(description="height in pixels of a tile as the model saw it")
    decimation: float = Field(description="image pixels per tile pixel; 1 = full resolution")
    overlap: int = Field(default=0, description="image pixels that neighbouring tiles share at least")
    overview: bool = Field(default=False, description="whether the region was also looked at in one piece, reduced")


class Provenance(Model):
    """What it takes to get the same answer again. Model fields are empty where no model was asked."""

    model: str = Field(default="", description="name of the model that answered")
    weights_digest: str = Field(default="", description="digest of its weights")
    task_token: str = Field(default="", description="task token that the model was given")
    expert: str = Field(default="", description="expert that the task token routes to")
    attention_backend: str = Field(default="", description="attention implementation in use")
    precision: str = Field(default="", description="number format of the computation")
    image_digest: str = Field(default="", description="digest of the image's content; of a pair both, earlier first")
    bands: list[int] = Field(default_factory=list, description="bands shown to the model, from 1, in order R, G, B")
    stretch: str = Field(default="", description="how band values became 8-bit values")
    placement: str = Field(
        default="",
        description="what the image's place or grid comes from: transform, world file NAME, ground control points",
    )
    embeddings: str = Field(default="", description="rasters and year of the embeddings that went to the model")
    tile_grid: TileGrid | None = Field(
        default=None, description="tiles that the region was read in; null where none was"
    )
    elapsed_s: float = Field(default=0.0, description="seconds from call to answer")


class Artifact(Model):
    name: str = Field(description="file name")
    kind: Literal["mask", "vectors", "preview"] = Field(description="what the file holds")
    uri: str = Field(description="resource URI of the file")
    path: str = Field(description="path of the file on the server's disk")
    mime_type: str = Field(description="media type of the file")


class Result(Model):
    """What every answer carries."""

    georeferenced: bool = Field(default=False, description="whether pixels of this image have known places on Earth")
    warnings: list[str] = Field(default_factory=list, description="what to keep in mind when using this answer")
    artifacts: list[Artifact] = Field(default_factory=list, description="files that belong to this answer")
    provenance: Provenance = Field(default_factory=Provenance, description="what this answer was made with")


class Band(Model):
    index: int = Field(description="band number, from 1")
    description: str = Field(description="the file's own description of the band; empty where it has none")
    color: str = Field(description="colour interpretation: red, green, blue, alpha, gray, palette, undefined, ...")


class InspectResult(Result):
    width: int = Field(description="pixels across")
    height: int = Field(description="pixels down")
    band_count: int = Field(description="number of bands, alpha included")
    bands: list[Band] = Field(description="the bands in file order")
    dtype: str = Field(description="data type of the first band, such as uint8")
    nodata: float | Literal["nan", "inf", "-inf"] | None = Field(description="value that marks missing pixels, or null")
    crs_wkt: str | None = Field(description="coordinate reference system as WKT, or null")
    epsg: int | None = Field(description="its EPSG code, or null where it has none")
    bounds_wgs84: list[float] | None = Field(
        description="[west, south, east, north] in degrees; west > east where the image crosses the antimeridian"
    )
    gsd_m: float | None = Field(description="ground sampling distance at the image's centre, in metres per pixel")
    area_km2: float | None = Field(description="ground that the whole image covers, geodesic, in square kilometres")
    modality: Modality = Field(description="best guess of what the sensor measured")
    modality_reason: str = Field(description="what the guess rests on")


class ListedImage(Model):
    image: str = Field(description="path to hand to the other tools")
    width: int = Field(description="pixels across")
    height: int = Field(description="pixels down")
    band_count: int = Field(description="number of bands")
    dtype: str = Field(description="data type of the first band")
    bytes: int = Field(description="size of the file")


class ListResult(Result):
    images: list[ListedImage] = Field(description="readable images, by path")
    roots: list[str] = Field(description="the folders that images may be read from")
    truncated: bool = Field(description="whether there are more images than are listed; name a folder to see them")


class CaptionPart(Model):
    region: list[int] = Field(description="[x1, y1, x2, y2] in image pixels")
    caption: str = Field(description="caption of this part alone")


class CaptionResult(Result):
    caption: str = Field(description="what the region shows")
    parts: list[CaptionPart] = Field(description="the parts it was reduced from; empty where one look sufficed")
    confidence: float = Field(ge=0, le=1, description="calibrated confidence; 0 where there was nothing to see")


class Alternative(Model):
    answer: str = Field(description="another possible answer")
    confidence: float = Field(ge=0, le=1, description="its calibrated confidence")


class Evidence(Model):
    region: list[int] = Field(description="[x1, y1, x2, y2] of the part of the image that was looked at")
    answer: str = Field(description="the answer that this part alone gives")
    confidence: float = Field(ge=0, le=1, description="its calibrated confidence")
    artifact: str = Field(default="", description="URI of the file that shows what was counted or measured, if any")


class VqaResult(Result):
    answer: str = Field(description="the answer; when abstained, the best guess or the reason why there is none")
    kind: AnswerKind = Field(description="what kind of answer the question calls for")
    confidence: float = Field(ge=0, le=1, description="calibrated confidence of the answer")
    abstained: bool = Field(description="true: the answer is not certain enough to be relied on")
    alternatives: list[Alternative] = Field(description="other answers, likeliest first")
    evidence: list[Evidence] = Field(description="parts of the image that the answer rests on, the most telling first")


class ClassScore(Model):
    label: str = Field(description="class name")
    score: float = Field(ge=0, le=1, description="calibrated probability among the given classes")


class ClassPart(Model):
    region: list[int] = Field(description="[x1, y1, x2, y2] in image pixels")
    label: str = Field(description="likeliest class of this part alone")
    score: float = Field(ge=0, le=1, description="its calibrated probability among the given classes")


class ClassifyResult(Result):
    label: str = Field(description="the likeliest class; empty where there was nothing to see")
    score: float = Field(ge=0, le=1, description="its calibrated probability among the given classes")
    top: list[ClassScore] = Field(description="the likeliest classes, best first")
    parts: list[ClassPart] = Field(
        default_factory=list,
        description="what it was reduced from, the look at the whole first; empty where one look sufficed",
    )


Ring = list[list[float]]


class GroundedObject(Model):
    label: str = Field(description="the phrase that it was found by")
    score: float = Field(ge=0, le=1, description="calibrated chance that the box is right")
    bbox_px: list[float] = Field(description="[x1, y1, x2, y2] in image pixels")
    polygon_lonlat: Ring | None = Field(
        description="the box on Earth: closed ring of [lon, lat], or null where it has no known place"
    )


class GroundResult(Result):
    objects: list[GroundedObject] = Field(description="what was found, best first, at most max_objects")
    count: int = Field(ge=0, description="how many were found, also beyond max_objects; 0: nothing was found")


class SegmentedClass(Model):
    label: str = Field(description="class name")
    value: int = Field(description="its pixel value in the mask; there 0 is none of the classes and 255 no data")
    pixels: int = Field(ge=0, description="image pixels of this class")
    share: float = Field(ge=0, le=1, description="of the pixels that hold data")
    area_m2: float | None = Field(description="geodesic area, or null where the image has no known place")


class SegmentResult(Result):
    classes: list[SegmentedClass] = Field(description="the classes in the order asked for")


class ChangedRegion(Model):
    score: float = Field(ge=0, le=1, description="mean probability of change over its pixels")
    bbox_px: list[int] = Field(description="[x1, y1, x2, y2] in pixels of the earlier image")
    polygon_lonlat: Ring | None = Field(
        description="its outline, simplified: closed ring of [lon, lat], or null where it has no known place"
    )
    area_m2: float | None = Field(description="geodesic area, or null where it has no known place")


class DetectChangeResult(Result):
    changed: bool = Field(description="whether any region changed")
    caption: str = Field(description="the change in words, from the figures; the two scenes in the model's words")
    changed_share: float = Field(ge=0, le=1, description="of the pixels that both images show")
    changed_area_m2: float | None = Field(description="geodesic area that changed, or null where its place is unknown")
    overlap_share: float = Field(ge=0, le=1, description="of the earlier image, what the later one covers")
    regions: list[ChangedRegion] = Field(description="what changed, largest first; all are in the vectors artifact")
