"""Boxes, masks and change over MCP: structured answers, linked files that can be read, pictures only on request."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mcp import Client, MCPError
from mcp.types import BlobResourceContents, TextResourceContents
from mcp_processes import Connect, links, pictures, stdio, text_of
from rasterio.io import MemoryFile

SCENE = "itaipu_landsat8.tif"
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("ground", {"image": SCENE, "query": "ship", "region": [100, 100, 300, 250]}),
    ("ground", {"image": SCENE, "query": "ship", "min_score": 0.99, "max_objects": 3}),
    ("segment", {"image": SCENE, "classes": ["water", "forest"], "region": [100, 100, 300, 250]}),
    ("detect_change", {"before": SCENE, "after": SCENE, "region": [100, 100, 300, 250]}),
    ("vqa", {"image": SCENE, "question": "How many ships are there?", "region": [100, 100, 300, 250]}),
]


@pytest.mark.parametrize(("tool", "arguments"), CALLS)
async def test_a_real_model_answers_as_the_published_schema_says_with_files_that_can_be_read(
    connect: Connect, tool: str, arguments: dict[str, Any]
) -> None:
    async with connect() as client:
        schemas = {one.name: one.output_schema for one in (await client.list_tools()).tools}
        result = await client.call_tool(tool, arguments)
        assert not result.is_error, text_of(result)
        assert 0 < len(text_of(result)) < 2000
        assert result.structured_content is not None
        jsonschema.Draft202012Validator(schemas[tool] or False).validate(result.structured_content)
        assert pictures(result) == []
        assert [link.uri for link in links(result)] == [one["uri"] for one in result.structured_content["artifacts"]]
        for link in links(result):
            [content] = (await client.read_resource(link.uri)).contents
            assert content.mime_type == link.mime_type
    if tool != "vqa":
        assert links(result)


async def test_a_box_that_ground_found_can_be_given_as_the_region_of_the_next_question(planted: Client) -> None:
    async with planted as client:
        found = await client.call_tool("ground", {"image": SCENE, "query": "ship"})
        assert found.structured_content is not None
        box = found.structured_content["objects"][0]["bbox_px"]
        assert box == [10.25, 20, 40, 32]
        asked = await client.call_tool("vqa", {"image": SCENE, "question": "Is there a ship?", "region": box})
    assert asked.structured_content is not None
    assert asked.structured_content["evidence"][0]["region"] == [10, 20, 40, 32]
    assert "1 found for 'ship': [10, 20, 40, 32] score 0.90" in text_of(found)


async def test_vectors_are_read_as_geojson_text_and_masks_as_geotiff_bytes(planted: Client) -> None:
    async with planted as client:
        answer = await client.call_tool("segment", {"image": SCENE, "classes": ["water"]})
        mask, vectors = links(answer)
        assert (mask.mime_type, vectors.mime_type) == ("application/x-geotiff", "application/geo+json")
        [text] = (await client.read_resource(vectors.uri)).contents
        [blob] = (await client.read_resource(mask.uri)).contents
    assert isinstance(text, TextResourceContents)
    assert json.loads(text.text)["features"][0]["properties"]["label"] == "water"
    assert isinstance(blob, BlobResourceContents)
    content = base64.b64decode(blob.blob)
    assert len(content) == mask.size
    with MemoryFile(content) as memory, memory.open() as file:
        assert (file.read(1)[:, :280] == 1).all()
        assert file.crs.to_epsg() == 32621


@pytest.mark.parametrize(("tool", "arguments"), CALLS[:4])
async def test_a_picture_comes_only_when_asked_for_and_is_small(
    planted: Client, tool: str, arguments: dict[str, Any]
) -> None:
    async with planted as client:
        assert pictures(await client.call_tool(tool, arguments)) == []
        shown = await client.call_tool(tool, arguments | {"preview": True})
    [picture] = pictures(shown)
    assert picture.mime_type == "image/png"
    assert 500 < len(base64.b64decode(picture.data)) <= 100_000
    assert not any(link.mime_type == "image/png" for link in links(shown))
    assert picture.data[:40] not in json.dumps(shown.structured_content)


async def test_a_file_that_is_gone_or_never_was_is_an_error_that_says_so(planted: Client) -> None:
    async with planted as client:
        for name in (f"mask-{'0' * 32}.tif", "..%2F..%2Fetc%2Fpasswd.png", "notes.geojson"):
            with pytest.raises(MCPError, match=r"artifact|Unknown resource"):
                await client.read_resource(f"rs-artifact://{name}")


async def test_a_checkpoint_without_boxes_and_masks_says_what_it_can_do_instead(
    debug_weights: Path, root: Path, tmp_path: Path, local_state: Path
) -> None:
    arguments = ["--root", str(root), "--weights", str(debug_weights), "--artifacts", str(tmp_path / "files")]
    async with Client(stdio(*arguments, RS_PERCEPTION_STATE=str(local_state))) as client:
        refused = await client.call_tool("ground", {"image": SCENE, "query": "ship"})
        counted = await client.call_tool("vqa", {"image": SCENE, "question": "How many ships are there?"})
    assert refused.is_error
    assert "no part for ground" in text_of(refused)
    assert "caption, vqa, classify" in text_of(refused)
    assert not counted.is_error, text_of(counted)
    assert links(counted) == []
