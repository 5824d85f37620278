"""What a client may rely on, whichever transport it uses: schemas, structured answers, and text beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jsonschema
import pytest
from mcp_processes import Connect, text_of

TOOLS = ["inspect_image", "list_images", "caption", "vqa", "ground", "segment", "detect_change", "classify"]
SCENE = "itaipu_landsat8.tif"


async def test_the_server_names_itself_its_version_and_its_tools_in_a_fixed_order(connect: Connect) -> None:
    async with connect() as client:
        tools = (await client.list_tools()).tools
        server = client.server_info
    assert server is not None
    assert (server.name, server.version) == ("rs-perception", version("rs-perception"))
    assert [tool.name for tool in tools] == TOOLS


async def test_every_tool_has_a_title_a_description_and_says_that_it_only_reads(connect: Connect) -> None:
    async with connect() as client:
        for tool in (await client.list_tools()).tools:
            assert tool.title
            assert tool.description
            assert "\n" not in tool.description
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint


async def test_inputs_are_flat_described_and_closed(connect: Connect) -> None:
    async with connect() as client:
        for tool in (await client.list_tools()).tools:
            assert tool.input_schema["additionalProperties"] is False
            for parameter in tool.input_schema["properties"].values():
                assert parameter["description"]
                assert isinstance(parameter["type"], str)
            assert not _keys(tool.input_schema) & {"$ref", "$defs", "anyOf", "oneOf", "allOf"}


async def test_output_schemas_hold_no_references_and_every_object_in_them_is_closed(connect: Connect) -> None:
    async with connect() as client:
        for tool in (await client.list_tools()).tools:
            assert tool.output_schema is not None
            assert not _keys(tool.output_schema) & {"$ref", "$defs"}
            objects = list(_objects(tool.output_schema))
            assert objects[0] is tool.output_schema
            assert all(one["additionalProperties"] is False for one in objects)


# Measured on this very list: one token is 4.0 characters to a tokenizer of Claude and 3.8 to that of DeepSeek.
CHARACTERS_PER_TOKEN = 3.8


async def test_the_whole_list_of_tools_takes_a_model_no_more_than_4000_tokens(connect: Connect) -> None:
    async with connect() as client:
        listed = (await client.list_tools()).model_dump(mode="json", by_alias=True, exclude_none=True)
    told = json.dumps(listed["tools"], separators=(",", ":"), ensure_ascii=False)
    assert len(told) / CHARACTERS_PER_TOKEN <= 4000


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("inspect_image", {"image": SCENE}),
        ("list_images", {}),
        ("caption", {"image": SCENE}),
        ("caption", {"image": SCENE, "region": [100, 100, 300, 250], "detail": "full"}),
        ("vqa", {"image": SCENE, "question": "Is there water?"}),
        ("classify", {"image": SCENE}),
        ("classify", {"image": SCENE, "labels": ["lake", "car park", "glacier"], "top_k": 2}),
    ],
)
async def test_an_answer_has_text_and_fits_the_published_schema(
    connect: Connect, tool: str, arguments: dict[str, Any]
) -> None:
    async with connect() as client:
        schemas = {one.name: one.output_schema for one in (await client.list_tools()).tools}
        result = await client.call_tool(tool, arguments)
    assert not result.is_error, text_of(result)
    assert 0 < len(text_of(result)) < 2000
    assert result.structured_content is not None
    jsonschema.Draft202012Validator(schemas[tool] or False).validate(result.structured_content)


async def test_inspect_image_says_size_bands_and_place(connect: Connect) -> None:
    async with connect() as client:
        facts = (await client.call_tool("inspect_image", {"image": SCENE})).structured_content
    assert facts is not None
    assert (facts["width"], facts["height"], facts["band_count"], facts["dtype"]) == (560, 560, 3, "uint16")
    assert facts["epsg"] == 32621
    assert facts["georeferenced"]
    assert facts["gsd_m"] == pytest.approx(30, rel=0.02)
    west, south, east, north = facts["bounds_wgs84"]
    assert west < -54.59 < east  # the dam
    assert south < -25.41 < north


async def test_list_images_names_what_the_other_tools_can_open(connect: Connect) -> None:
    async with connect() as client:
        listed = (await client.call_tool("list_images", {})).structured_content
        assert listed is not None
        names = [one["image"] for one in listed["images"]]
        assert len(names) == 3
        for name in names:
            assert not (await client.call_tool("inspect_image", {"image": name})).is_error


async def test_a_model_answer_says_what_it_was_made_with(connect: Connect) -> None:
    async with connect() as client:
        answer = (await client.call_tool("caption", {"image": SCENE})).structured_content
    assert answer is not None
    provenance = answer["provenance"]
    for name in ("model", "weights_digest", "task_token", "expert", "precision", "image_digest", "stretch"):
        assert provenance[name], name
    assert provenance["bands"] == [1, 2, 3]


async def test_probabilities_over_given_labels_add_up_to_one(connect: Connect) -> None:
    labels = ["lake", "car park", "glacier"]
    async with connect() as client:
        answer = (await client.call_tool("classify", {"image": SCENE, "labels": labels})).structured_content
    assert answer is not None
    assert {one["label"] for one in answer["top"]} == set(labels)
    assert sum(one["score"] for one in answer["top"]) == pytest.approx(1, abs=1e-3)
    assert answer["label"] == answer["top"][0]["label"]


async def test_an_image_without_georeference_is_answered_with_a_warning(connect: Connect) -> None:
    async with connect() as client:
        answer = (await client.call_tool("caption", {"image": "yellowstone_road.jpg"})).structured_content
    assert answer is not None
    assert not answer["georeferenced"]
    assert answer["warnings"]


async def test_lists_may_come_as_json_text_as_some_clients_send_them(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("caption", {"image": SCENE, "region": "[100, 100, 300, 250]"})
    assert not result.is_error, text_of(result)


async def test_a_client_of_the_2025_protocol_gets_the_same_answer(connect: Connect) -> None:
    async with connect() as new, connect(mode="legacy") as old:
        assert (new.protocol_version, old.protocol_version) == ("2026-07-28", "2025-11-25")
        answers = [await client.call_tool("classify", {"image": SCENE}) for client in (new, old)]
    assert text_of(answers[0]) == text_of(answers[1])


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """The objects of a schema, from the outermost inwards."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from _objects(value)


def _keys(schema: Any) -> set[str]:
    if isinstance(schema, dict):
        return set(schema) | {key for value in schema.values() for key in _keys(value)}
    if isinstance(schema, list):
        return {key for value in schema for key in _keys(value)}
    return set()
