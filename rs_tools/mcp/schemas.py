"""The schemas of answers as MCP publishes them: what an agent needs to read an answer, and no word more.

Every client hands all of them to its model before anything is asked, so they are much shorter than those of the result
models, which every answer is checked against before it leaves. An answer that fits its model fits what is published.
"""

from __future__ import annotations

from typing import Any

from rs_tools.declarations import Declaration, without
from rs_tools.results import Artifact

_NOT_TOLD = ("title", "default", "description", "minimum", "maximum")
# What the names of fields do not tell.
_NOTES = {
    "abstained": "true: a guess",
    "bounds_wgs84": "[west, south, east, north]",
    "changed_share": "of what both show",
    "count": "also beyond max_objects",
    "overlap_share": "of before",
    "polygon_lonlat": "closed ring of [lon, lat]",
    "value": "in the mask; there 255 is nodata",
}


def published(declaration: Declaration) -> dict[str, Any]:
    """The schema of a tool's answers: closed, flat (no references), with few words."""
    schema = _short(without(declaration.result.model_json_schema(), *_NOT_TOLD))
    fields = schema["properties"]
    # Closed by the form of its names: to list eleven of them in every schema would cost more than all descriptions.
    fields["provenance"] = {"type": "object", "patternProperties": {"^[a-z_]+$": {}}, "additionalProperties": False}
    if declaration.files:
        files = {"type": "object", "properties": {name: {} for name in Artifact.model_fields}}
        fields["artifacts"] = {"type": "array", "items": files | {"additionalProperties": False}}
    else:
        fields["artifacts"] = {"type": "array", "maxItems": 0}
    return schema


def _short(schema: dict[str, Any]) -> dict[str, Any]:
    """A choice of types as a list of them, which is shorter and as true; what is required only at the top."""
    short = dict(schema)
    if arms := short.pop("anyOf", None):
        short["type"] = sorted({arm["type"] for arm in arms})
        short |= next(({"items": arm["items"]} for arm in arms if "items" in arm), {})
    if "properties" in short:
        short["properties"] = {
            name: _short(field) | ({"description": _NOTES[name]} if name in _NOTES else {})
            for name, field in short["properties"].items()
        }
    if "items" in short:
        short["items"] = _short(short["items"])
        short["items"].pop("required", None)
    return short
