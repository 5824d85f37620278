"""The LangChain tools through LangChain's own standard tests, over HTTP to a model that sees what a test paints."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, ToolException
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from planted import BLUE, RED, PlantedModel, painted
from planted_server import planted_server
from rasters import BUNDLED, REPOSITORY, UTM, write
from scripts import loaded

import mcp_server
from rs_tools import results
from rs_tools.errors import AccessError, RegionError
from rs_tools.langchain import RemoteSensingToolkit
from rs_tools.summary import summarize

EXAMPLES: dict[str, tuple[dict[str, Any], type[results.Result]]] = {
    "inspect_image": ({"image": "early.tif"}, results.InspectResult),
    "list_images": ({}, results.ListResult),
    "caption": ({"image": "early.tif", "detail": "full"}, results.CaptionResult),
    "vqa": ({"image": "early.tif", "question": "Is there a lake?"}, results.VqaResult),
    "ground": ({"image": "early.tif", "query": "ship", "max_objects": 3}, results.GroundResult),
    "segment": ({"image": "early.tif", "classes": ["water"], "region": [0, 0, 50, 50]}, results.SegmentResult),
    "detect_change": ({"before": "early.tif", "after": "late.tif"}, results.DetectChangeResult),
    "classify": ({"image": "early.tif", "labels": ["sea", "field"]}, results.ClassifyResult),
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with planted_server(PlantedModel) as url:
        yield url


@pytest.fixture(scope="module")
def toolkit(server: str, tmp_path_factory: pytest.TempPathFactory) -> RemoteSensingToolkit:
    """Over two images of one place: a ship that is gone in the later one, which has a lake."""
    root = tmp_path_factory.mktemp("imagery")
    place: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633", "transform": UTM}
    write(root / "early.tif", painted(80, 90, ((10, 10, 20, 15), RED)), **place)
    write(root / "late.tif", painted(80, 90, ((40, 40, 60, 60), BLUE)), **place)
    files = tmp_path_factory.mktemp("files")
    return RemoteSensingToolkit(roots=[root], server=server, artifacts=files)


@pytest.fixture(scope="module")
def tools(toolkit: RemoteSensingToolkit) -> dict[str, BaseTool]:
    return {tool.name: tool for tool in toolkit.get_tools()}


def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": tool, "args": arguments, "id": "1", "type": "tool_call"}


# --- the standard tests of LangChain


class _EachTool:
    @pytest.fixture(autouse=True, params=EXAMPLES)
    def _of(self, request: pytest.FixtureRequest, tools: dict[str, BaseTool]) -> None:
        self._name, self._made = request.param, tools[request.param]

    @property
    def tool_constructor(self) -> BaseTool:
        return self._made

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return EXAMPLES[self._name][0]


class TestUnit(_EachTool, ToolsUnitTests): ...


class TestIntegration(_EachTool, ToolsIntegrationTests): ...


# --- what a model is told


def test_the_tools_are_those_of_mcp_with_their_words_and_parameters(tools: dict[str, BaseTool]) -> None:
    server = mcp_server.build_server(mcp_server.AccessPolicy([BUNDLED]))
    published = {tool.name: tool for tool in asyncio.run(server.list_tools())}
    assert list(tools) == list(published) == list(EXAMPLES)
    for name, tool in tools.items():
        told = convert_to_openai_tool(tool)["function"]
        assert (told["name"], told["description"]) == (name, published[name].description)
        assert told["parameters"]["properties"] == published[name].input_schema["properties"]
        assert told["parameters"].get("required", []) == published[name].input_schema.get("required", [])


def test_parameters_are_flat_and_each_is_described(tools: dict[str, BaseTool]) -> None:
    for tool in tools.values():
        schema = tool.get_input_jsonschema()
        assert "$ref" not in json.dumps(schema)
        for name, field in schema["properties"].items():
            assert len(field["description"]) > 20, f"{tool.name}.{name}"


# --- what comes back


@pytest.mark.parametrize("name", EXAMPLES)
async def test_the_message_is_in_words_and_its_artifact_is_the_typed_result(
    name: str, tools: dict[str, BaseTool]
) -> None:
    arguments, result_type = EXAMPLES[name]
    sync = await asyncio.to_thread(tools[name].invoke, call(name, arguments))
    message = await tools[name].ainvoke(call(name, arguments))
    for one in (sync, message):
        assert isinstance(one, ToolMessage)
        assert type(one.artifact) is result_type
        assert one.status == "success"
        assert one.text.startswith(summarize(one.artifact))
    assert sync.artifact.model_dump(exclude={"provenance", "artifacts"}) == message.artifact.model_dump(
        exclude={"provenance", "artifacts"}
    )


def test_the_message_names_the_files_of_the_answer(tools: dict[str, BaseTool]) -> None:
    message = tools["segment"].invoke(call("segment", {"image": "late.tif", "classes": ["water"], "preview": True}))
    paths = dict(line.split(": ", 1) for line in message.text.splitlines()[-3:])
    assert sorted(paths) == ["mask", "preview", "vectors"]
    assert all(Path(path).is_file() for path in paths.values())
    assert message.artifact.classes[0].pixels == 400


async def test_a_box_that_was_found_can_be_asked_about(tools: dict[str, BaseTool]) -> None:
    found = await tools["ground"].ainvoke(call("ground", {"image": "early.tif", "query": "ship"}))
    [ship] = found.artifact.objects
    assert "[10, 10, 20, 15]" in found.text
    closer = await tools["caption"].ainvoke(call("caption", {"image": "early.tif", "region": ship.bbox_px}))
    assert closer.artifact.provenance.tile_grid.tile_width == 10


async def test_null_stands_for_an_argument_that_is_not_given(tools: dict[str, BaseTool]) -> None:
    message = await tools["caption"].ainvoke(call("caption", {"image": "early.tif", "region": None, "bands": None}))
    assert message.status == "success", message.text


def test_callers_in_threads_and_loops_of_their_own_share_the_tools(tools: dict[str, BaseTool]) -> None:
    async def both() -> list[Any]:
        inside = tools["caption"].ainvoke({"image": "early.tif"})
        outside = asyncio.to_thread(tools["caption"].invoke, {"image": "late.tif"})
        return [*await asyncio.gather(inside, outside)]

    for _ in range(2):  # the second loop finds connections that were opened under the first
        early, late = asyncio.run(both())
        assert early.startswith("Green fields.")
        assert late.startswith("A lake.")


FORKING = """
import os, signal, sys
from rs_tools.langchain import RemoteSensingToolkit
root, server, artifacts = sys.argv[1:]
tools = {tool.name: tool for tool in RemoteSensingToolkit(roots=[root], server=server, artifacts=artifacts).get_tools()}
words = tools["ground"].invoke({"image": "early.tif", "query": "ship"})
child = os.fork()
if child == 0:
    signal.alarm(60)
    again = tools["ground"].invoke({"image": "early.tif", "query": "ship"})
    os._exit(0 if again.splitlines()[0] == words.splitlines()[0] else 1)
assert os.waitpid(child, 0)[1] == 0
assert tools["ground"].invoke({"image": "early.tif", "query": "ship"})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_process_forked_from_the_one_that_made_the_tools_goes_on_with_them(
    toolkit: RemoteSensingToolkit, server: str
) -> None:
    """As web servers and pools of workers do, which load their application before they fork."""
    command = [sys.executable, "-c", FORKING, str(toolkit.roots[0]), server, str(toolkit.artifacts)]
    subprocess.run(command, check=True, timeout=300)


async def test_cancelling_a_call_ends_its_work(tools: dict[str, BaseTool]) -> None:
    started, ended = threading.Event(), threading.Event()

    async def endless(**_: Any) -> results.Result:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("it was to be cancelled")

    caption = tools["caption"].model_copy(update={"ask": endless})
    waiting = asyncio.create_task(caption.ainvoke({"image": "early.tif"}))
    assert await asyncio.to_thread(started.wait, 120)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(ended.wait, 120)


# --- refusals


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("caption", {"image": "absent.tif"}, ["no image file", "list_images"]),
        ("caption", {"image": "/etc/passwd"}, ["outside the allowed folders", "list_images"]),
        ("vqa", {"image": "early.tif", "question": " "}, ["empty"]),
        ("ground", {"image": "early.tif", "query": "ship", "region": [0, 0, 91, 80]}, ["90x80", "x1 < x2"]),
        ("caption", {"image": "early.tif", "bbox": [0, 0, 9, 9]}, ["caption cannot use", "bbox", "region"]),
        ("segment", {"image": "early.tif"}, ["classes: Field required", "classes (array, required)"]),
        ("caption", {"image": "early.tif", "detail": "long"}, ["'short' or 'full'"]),
        ("ground", {"image": "early.tif", "query": "ship", "min_score": float("nan")}, ["min_score", "finite"]),
    ],
)
async def test_a_refusal_is_a_message_that_the_agent_can_act_on(
    name: str, arguments: dict[str, Any], words: list[str], tools: dict[str, BaseTool]
) -> None:
    sync = await asyncio.to_thread(tools[name].invoke, call(name, arguments))
    message = await tools[name].ainvoke(call(name, arguments))
    assert (message.status, message.artifact) == ("error", None)
    assert all(word in message.text for word in words), message.text
    assert (sync.status, sync.text) == ("error", message.text)


async def test_a_refusal_is_raised_with_its_cause_where_the_caller_wants_it(toolkit: RemoteSensingToolkit) -> None:
    caption = next(tool for tool in toolkit.get_tools() if tool.name == "caption")
    caption.handle_tool_error = False
    with pytest.raises(ToolException, match="90x80") as caught:
        await caption.ainvoke({"image": "early.tif", "region": [0, 0, 91, 80]})
    assert isinstance(caught.value.__cause__, RegionError)


async def test_a_server_that_does_not_answer_is_told_to_the_agent(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", painted(20, 20), photometric="RGB")
    nobody = RemoteSensingToolkit(roots=[tmp_path], server="http://127.0.0.1:9")
    caption = next(tool for tool in nobody.get_tools() if tool.name == "caption")
    message = await caption.ainvoke(call("caption", {"image": "a.tif"}))
    assert message.status == "error"
    assert "http://127.0.0.1:9 does not answer" in message.text


def test_a_toolkit_without_a_folder_cannot_be_made_and_its_token_is_not_printed(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="absent"):
        RemoteSensingToolkit(roots=[tmp_path / "absent"])
    with pytest.raises(ValueError, match="roots"):
        RemoteSensingToolkit(roots=[])
    with pytest.raises(ValueError, match="roots"):
        RemoteSensingToolkit(roots=str(tmp_path))
    kept = RemoteSensingToolkit.model_validate({"roots": [tmp_path], "server": "http://gpu", "token": "opensesame"})
    assert "opensesame" not in f"{kept!r} {kept.get_tools()!r} {kept.model_dump_json()}"


def test_without_langchain_the_package_works_and_the_module_names_the_extra() -> None:
    program = """
import sys
import threading
sys.modules["langchain_core"] = None
import rs_tools, rs_tools.tools
try:
    import rs_tools.langchain
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "pip install 'rs-perception[langchain]'" in done.stdout


# --- the example


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return loaded(REPOSITORY / "examples" / "langchain_agent.py")


def test_the_example_agent_chains_from_what_it_found_to_a_closer_look(
    example: ModuleType, toolkit: RemoteSensingToolkit
) -> None:
    script = example.Script(image="early.tif", thing="ship")
    messages = example.converse(script, toolkit.get_tools(), "What is in early.tif?")
    told = [message for message in messages if isinstance(message, ToolMessage)]
    assert [message.name for message in told] == ["inspect_image", "caption", "ground", "vqa"]
    assert {message.status for message in told} == {"success"}
    assert told[3].artifact.evidence[0].region == [10, 10, 20, 15]
    assert "1 found for 'ship'" in messages[-1].text


def test_the_example_agent_goes_on_where_nothing_is_found(example: ModuleType, toolkit: RemoteSensingToolkit) -> None:
    script = example.Script(image="late.tif", thing="ship")
    messages = example.converse(script, toolkit.get_tools(), "What is in late.tif?")
    asked = [call["args"] for message in messages for call in getattr(message, "tool_calls", [])]
    assert "ground: Nothing was found." in messages[-1].text
    assert asked[-1] == {"image": "late.tif", "question": "Is there a ship?", "region": []}


def test_the_example_agent_is_told_what_a_tool_refused_and_answers_all_the_same(
    example: ModuleType, toolkit: RemoteSensingToolkit
) -> None:
    script = example.Script(image="absent.tif", thing="ship")
    messages = example.converse(script, toolkit.get_tools(), "What is in absent.tif?")
    told = [message for message in messages if isinstance(message, ToolMessage)]
    assert {message.status for message in told} == {"error"}
    assert "no image file 'absent.tif'" in told[0].text
    assert "inspect_image: There is no image file" in messages[-1].text
