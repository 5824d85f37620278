"""What an agent is told when something is wrong, and that the server goes on serving."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp_processes import Connect, free_port, running_model_server, stdio, text_of

import mcp_server
from rs_tools.imagery.access import AccessPolicy
from rs_tools.tools import Tools

SCENE = "itaipu_landsat8.tif"


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("inspect_image", {"image": "no_such_scene.tif"}, ["no_such_scene.tif", "list_images"]),
        ("caption", {"image": "notes.tif"}, ["notes.tif", "text file", "GeoTIFF"]),
        ("caption", {"image": "truncated.tif"}, ["truncated.tif", "GTiff"]),
        ("caption", {"image": SCENE, "region": [200, 200, 100, 100]}, ["560"]),
        ("vqa", {"image": SCENE, "question": "  "}, ["question"]),
        ("list_images", {"folder": "nowhere"}, ["nowhere"]),
    ],
)
async def test_a_call_that_cannot_be_answered_says_why_and_the_server_goes_on(
    connect: Connect, tool: str, arguments: dict[str, Any], said: list[str]
) -> None:
    async with connect() as client:
        refused = await client.call_tool(tool, arguments)
        assert refused.is_error
        assert refused.structured_content is None
        for words in said:
            assert words in text_of(refused)
        answered = await client.call_tool("caption", {"image": SCENE})
        assert not answered.is_error, text_of(answered)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": SCENE, "bbox": [0, 0, 10, 10]}, "bbox: there is no such argument"),
        ({"image": SCENE, "detail": "long"}, "'short' or 'full'"),
        ({"image": SCENE, "region": ["left", "right"]}, "region.0"),
        ({"image": "\ud800.tif"}, "half a character"),
        ({}, "image: Field required"),
    ],
)
async def test_arguments_that_do_not_fit_are_refused_by_name_with_what_the_tool_takes(
    planted: Client, arguments: dict[str, Any], said: str
) -> None:
    async with planted as client:
        refused = await client.call_tool("caption", arguments)
    assert refused.is_error
    assert said in text_of(refused)
    takes = "image (string, required), region (array), detail (string), bands (array), embeddings (string)"
    assert f"It takes {takes}." in text_of(refused)


async def test_null_stands_for_an_argument_that_is_not_given(planted: Client) -> None:
    empty = {"region": None, "detail": None, "bands": None, "embeddings": None}
    async with planted as client:
        answered = await client.call_tool("caption", {"image": SCENE, **empty})
        refused = await client.call_tool("caption", {"image": None, **empty})
    assert not answered.is_error, text_of(answered)
    assert refused.is_error
    assert "image: Field required" in text_of(refused)


async def test_without_a_model_server_the_agent_learns_so_and_inspection_still_works(root: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with Client(stdio("--root", str(root), "--model-url", url)) as client:
        refused = await client.call_tool("caption", {"image": SCENE})
        assert refused.is_error
        assert url in text_of(refused)
        assert "rs-model-server" in text_of(refused)
        assert not (await client.call_tool("inspect_image", {"image": SCENE})).is_error


async def test_a_model_server_that_dies_between_calls_gives_an_error_not_a_hang(
    debug_weights: Path, token_file: Path, root: Path
) -> None:
    with running_model_server(debug_weights, token_file) as model:
        arguments = ["--root", str(root), "--model-url", model.url, "--token-file", str(token_file)]
        async with Client(stdio(*arguments), read_timeout_seconds=300) as client:
            assert not (await client.call_tool("caption", {"image": SCENE})).is_error
            model.process.kill()
            model.process.wait()
            refused = await client.call_tool("caption", {"image": SCENE})
            assert refused.is_error
            assert "does not answer" in text_of(refused)
            assert not (await client.call_tool("list_images", {})).is_error


async def test_a_fault_of_ours_is_logged_in_full_and_told_without_its_words(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise KeyError("an inner secret")

    monkeypatch.setattr(Tools, "list_images", broken)
    with caplog.at_level(logging.ERROR):
        async with Client(mcp_server.build_server(AccessPolicy([root]))) as client:
            refused = await client.call_tool("list_images", {})
    assert refused.is_error
    assert "secret" not in text_of(refused)
    assert "an inner secret" in caplog.text
