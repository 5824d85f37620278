"""The typed contract as a client sees it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from rs_tools.results import (
    Artifact,
    CaptionResult,
    ClassifyResult,
    DetectChangeResult,
    GroundResult,
    InspectResult,
    ListResult,
    Provenance,
    Result,
    SegmentResult,
    TileGrid,
    VqaResult,
)

RESULTS: list[type[Result]] = [
    InspectResult, ListResult, CaptionResult, VqaResult, ClassifyResult, GroundResult, SegmentResult, DetectChangeResult
]  # fmt: skip
COMMON = {"artifacts", "provenance", "warnings", "georeferenced"}


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [found for value in schema.values() for found in objects(value)]


@pytest.mark.parametrize("model", RESULTS)
def test_schemas_are_closed_described_and_hold_no_references(model: type[Result]) -> None:
    for schema in (model.model_json_schema(), TypeAdapter(model).json_schema(mode="serialization")):
        text = json.dumps(schema)
        assert "$ref" not in text
        assert "$defs" not in text
        for found in objects(schema):
            assert found["additionalProperties"] is False
            assert all(field.get("description") for field in found["properties"].values())


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (
            InspectResult,
            "width height band_count bands dtype nodata crs_wkt epsg bounds_wgs84 gsd_m area_km2 modality "
            "modality_reason",
        ),
        (ListResult, "images roots truncated"),
        (CaptionResult, "caption parts confidence"),
        (VqaResult, "answer kind confidence abstained alternatives evidence"),
        (ClassifyResult, "label score top parts"),
        (GroundResult, "objects count"),
        (SegmentResult, "classes"),
        (DetectChangeResult, "changed caption changed_share changed_area_m2 overlap_share regions"),
    ],
)
def test_results_have_exactly_the_agreed_fields(model: type[Result], fields: str) -> None:
    assert set(model.model_fields) == set(fields.split()) | COMMON


def test_an_answer_conforms_to_its_schema() -> None:
    answer = CaptionResult(
        caption="A river.",
        parts=[],
        confidence=0.5,
        artifacts=[Artifact(name="m.tif", kind="mask", uri="rs://m", path="/m.tif", mime_type="application/x-geotiff")],
        provenance=Provenance(tile_grid=TileGrid(columns=1, rows=1, tile_width=5, tile_height=5, decimation=1.5)),
    )
    jsonschema.validate(json.loads(answer.model_dump_json()), CaptionResult.model_json_schema())
    assert CaptionResult.model_validate_json(answer.model_dump_json()) == answer


@pytest.mark.parametrize("wrong", [{"confidence": float("nan")}, {"confidence": 1.5}, {"colour": "blue"}])
def test_unknown_fields_and_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CaptionResult.model_validate({"caption": "", "parts": [], "confidence": 0.5} | wrong)
