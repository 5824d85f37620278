"""What a client finds beside the tools: files of answers, classes, the model card, prompts and their completions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from mcp import Client, MCPError
from mcp.types import PromptReference, ResourceTemplateReference, TextResourceContents
from mcp_models import PlantedModel
from mcp_processes import TOKEN, ModelServer, free_port

from rs_tools.declarations import DECLARATIONS
from rs_tools.mcp import resources as mcp_resources
from rs_tools.mcp.resources import MODEL_CARD, TAXONOMY, AnsweredFiles
from rs_tools.model_facts import EMBEDDED

PROMPTS = {
    "flood_damage": {"before": "b.tif", "after": "a.tif"},
    "port_activity": {"image": "p.tif", "earlier": "e.tif"},
    "urban_growth": {"before": "b.tif", "after": "a.tif"},
}


@pytest.fixture
def client(small: Path, serve: Callable[..., Client]) -> Client:
    return serve(small, PlantedModel())


async def text_at(client: Client, uri: str) -> str:
    [content] = (await client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return content.text


async def test_files_of_answers_are_listed_the_newest_first_and_can_be_read(client: Client) -> None:
    async with client as session:
        before = [one.uri for one in (await session.list_resources()).resources]
        await session.call_tool("ground", {"image": "scene.tif", "query": "ship"})
        answer = await session.call_tool("segment", {"image": "scene.tif", "classes": ["water"]})
        listed = (await session.list_resources()).resources
        assert before == [TAXONOMY, MODEL_CARD]
        assert [one.uri for one in listed[:2]] == before
        assert len(listed) == 5
        assert answer.structured_content is not None
        assert {one.uri for one in listed[2:4]} == {one["uri"] for one in answer.structured_content["artifacts"]}
        for one in listed:
            [content] = (await session.read_resource(one.uri)).contents
            assert content.mime_type == one.mime_type


async def test_a_file_that_is_gone_is_no_longer_listed(client: Client, tmp_path: Path) -> None:
    async with client as session:
        await session.call_tool("ground", {"image": "scene.tif", "query": "ship"})
        for file in (tmp_path / "artifacts").iterdir():
            file.unlink()
        assert [one.uri for one in (await session.list_resources()).resources] == [TAXONOMY, MODEL_CARD]


async def test_files_are_listed_only_to_the_caller_whose_answers_they_belong_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = AnsweredFiles()

    async def heard(caller: str, method: str, result: dict[str, Any]) -> dict[str, Any]:
        async def answer(_: Any) -> dict[str, Any]:
            return result

        monkeypatch.setattr(mcp_resources, "current_caller", lambda: caller)
        told = await listing(cast(Any, SimpleNamespace(method=method)), answer)
        assert isinstance(told, dict)
        return told

    def file(name: str) -> dict[str, str]:
        path = tmp_path / name
        path.touch()
        return {"name": name, "kind": "mask", "uri": f"rs-artifact://{name}", "path": str(path), "mime_type": "x/y"}

    await heard("alice", "tools/call", {"structuredContent": {"artifacts": [file("a.tif")]}})
    await heard("bob", "tools/call", {"structuredContent": {"artifacts": [file("b.tif")]}})
    await heard("bob", "tools/call", {"content": [], "isError": True})
    for caller, own in (("alice", ["a.tif"]), ("bob", ["b.tif"]), ("carol", [])):
        told = await heard(caller, "resources/list", {"resources": []})
        assert [one["name"] for one in told["resources"]] == own


async def test_the_classes_and_the_card_are_those_of_the_checkpoint_and_start_no_server(client: Client) -> None:
    async with client as session:
        taxonomy = json.loads(await text_at(session, TAXONOMY))
        card = await text_at(session, MODEL_CARD)
    assert taxonomy["model"] == "nano"
    assert {"forest", "harbor"} <= set(taxonomy["scenes"])
    assert "port" not in taxonomy["scenes"]  # one class with "harbor"
    assert "ship" in taxonomy["things"]
    assert "water" in taxonomy["covers"]
    assert card == (EMBEDDED / "README.md").read_text()


async def test_a_checkpoint_without_classes_or_card_says_so(
    small: Path, serve: Callable[..., Client], tmp_path: Path
) -> None:
    async with serve(small, PlantedModel(), weights=str(tmp_path / "mine")) as session:
        taxonomy = json.loads(await text_at(session, TAXONOMY))
        assert taxonomy == {"model": "mine", "scenes": [], "things": [], "covers": []}
        assert "without a model card" in await text_at(session, MODEL_CARD)


@pytest.fixture
def said(model_server: ModelServer) -> dict[str, Any]:
    """What the model server says of its model."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.get(f"{model_server.url}/v1/models", headers=headers, trust_env=False).json()["data"][0]


async def test_of_a_model_server_elsewhere_the_classes_are_asked(
    small: Path, serve: Callable[..., Client], model_server: ModelServer, said: dict[str, Any]
) -> None:
    async with serve(small, PlantedModel(), url=model_server.url, token=TOKEN) as session:
        assert json.loads(await text_at(session, TAXONOMY))["scenes"] == said["taxonomy"]
        card = await text_at(session, MODEL_CARD)
    assert said["weights_digest"] in card
    assert TOKEN not in card


async def test_a_model_server_that_does_not_answer_is_named(small: Path, serve: Callable[..., Client]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with serve(small, PlantedModel(), url=url) as session:
        for uri in (TAXONOMY, MODEL_CARD):
            with pytest.raises(MCPError, match=url):
                await session.read_resource(uri)


async def test_each_prompt_names_its_images_and_only_tools_that_there_are(client: Client) -> None:
    names = {declaration.name for declaration in DECLARATIONS}
    async with client as session:
        prompts = {prompt.name: prompt for prompt in (await session.list_prompts()).prompts}
        assert list(prompts) == list(PROMPTS)
        for name, arguments in PROMPTS.items():
            assert prompts[name].title
            assert prompts[name].description
            assert all(one.description for one in prompts[name].arguments or ())
            [message] = (await session.get_prompt(name, arguments)).messages
            text = getattr(message.content, "text", "")
            assert all(repr(value) in text for value in arguments.values())
            assert len({tool for tool in names if tool in text}) >= 4
            assert "estimates" in text


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [("flood_damage", {"before": "b.tif"}, "after"), ("weather", {}, "weather"), ("port_activity", None, "image")],
)
async def test_a_prompt_that_cannot_be_given_says_what_is_missing(
    client: Client, name: str, arguments: dict[str, str] | None, said: str
) -> None:
    async with client as session:
        with pytest.raises(MCPError, match=said) as refused:
            await session.get_prompt(name, arguments)
    assert refused.value.error.code == -32602


async def test_arguments_of_prompts_complete_to_images_and_classes(client: Client, small: Path) -> None:
    flood = PromptReference(type="ref/prompt", name="flood_damage")
    async with client as session:

        async def completed(argument: str, typed: str) -> list[str]:
            given = {"name": argument, "value": typed}
            return (await session.complete(flood, given)).completion.values

        assert await completed("before", "late") == [str(small / "later.tif")]
        (small / os.fsdecode(b"caf\xe9.tif")).touch()  # a name that no answer can hold
        assert await completed("before", "caf") == []
        (small / os.fsdecode(b"caf\xe9.tif")).unlink()
        assert await completed("after", str(small / "sc")) == [str(small / "scene.tif")]
        assert (await completed("exposed", "b"))[0] == "building"
        assert await completed("exposed", "no such thing") == []
        assert await completed("nothing", "x") == []
        template = ResourceTemplateReference(type="ref/resource", uri="rs-artifact://{name}.tif")
        assert (await session.complete(template, {"name": "name", "value": ""})).completion.values == []
