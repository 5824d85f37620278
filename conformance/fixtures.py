"""What the official conformance suite wants to call, added to the product's own server: for tests alone.

The suite's scenarios name tools, resources and prompts that no product has, so that they can look at every part of the
protocol. They are added to the server that `build_server` makes, and served by `http_app`: what is tested is the
product's, from its middleware to its HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Annotated, Any, Literal, cast

from mcp.server import MCPServer
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPError
from mcp.types import (
    AudioContent,
    CallToolResult,
    ContentBlock,
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    InputRequest,
    InputRequiredResult,
    ListRootsRequest,
    ListRootsResult,
    RequestParams,
    SamplingMessage,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    TextResourceContents,
    UnsubscribeRequestParams,
)
from mcp_types.jsonrpc import MISSING_REQUIRED_CLIENT_CAPABILITY
from pydantic import BaseModel, Field

Ctx = Context[Any, Any]

# A PNG file of one red pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
# A WAV file of one silent sample: 8 kHz, mono, 16 bit.
_FORMAT = b"WAVEfmt " + (16).to_bytes(4, "little") + bytes((1, 0, 1, 0, 64, 31, 0, 0, 128, 62, 0, 0, 2, 0, 16, 0))
_SOUND = _FORMAT + b"data" + (2).to_bytes(4, "little") + bytes(2)
SILENCE = base64.b64encode(b"RIFF" + len(_SOUND).to_bytes(4, "little") + _SOUND).decode()

PICTURE = ImageContent(type="image", data=PIXEL, mime_type="image/png")


def add_fixtures(server: MCPServer[Any]) -> None:
    """Everything that scenarios of either protocol revision ask for, but the tasks extension."""
    _add_content(server)
    _add_legacy_requests(server)
    _add_stateless(server)
    _add_input_required(server)
    _add_states(server)
    _add_schemas(server)
    _add_resources(server)
    _add_prompts(server)


def _embedded(uri: str, text: str, mime_type: str) -> EmbeddedResource:
    contents = TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return EmbeddedResource(type="resource", resource=contents)


def _add_content(server: MCPServer[Any]) -> None:
    def answers(name: str, description: str, *content: ContentBlock) -> None:
        async def answer() -> CallToolResult:
            return CallToolResult(content=list(content))

        server.add_tool(answer, name=name, description=description)

    text = TextContent(type="text", text="This is a simple text response for testing.")
    answers("test_simple_text", "Answers with text", text)
    answers("test_image_content", "Answers with an image", PICTURE)
    answers("test_audio_content", "Answers with sound", AudioContent(type="audio", data=SILENCE, mime_type="audio/wav"))
    embedded = _embedded("test://embedded-resource", "This is an embedded resource content.", "text/plain")
    answers("test_embedded_resource", "Answers with a resource", embedded)
    mixed = _embedded("test://mixed-content-resource", json.dumps({"test": "data", "value": 123}), "application/json")
    title = TextContent(type="text", text="Multiple content types test:")
    answers("test_multiple_content_types", "Answers with text, an image and a resource", title, PICTURE, mixed)

    @server.tool(description="Always fails")
    async def test_error_handling() -> str:
        raise ToolError("This tool intentionally returns an error for testing")

    @server.tool(description="Reports its progress")
    async def test_tool_with_progress(ctx: Ctx) -> str:
        for done in (0, 50, 100):
            await ctx.report_progress(done, 100, f"{done} of 100")
            await asyncio.sleep(0.05)
        return "done"


class Contact(BaseModel):
    username: str = Field(description="User's response")
    email: str = Field(description="User's email address")


class Defaults(BaseModel):
    name: str = Field(default="John Doe", description="User name")
    age: int = Field(default=30, description="User age")
    score: float = Field(default=95.5, description="User score")
    status: Literal["active", "inactive", "pending"] = Field(default="active", description="User status")
    verified: bool = Field(default=True, description="Verification status")


def _titled(*values: str) -> list[dict[str, str]]:
    return [{"const": value, "title": value.capitalize()} for value in values]


class Choices(BaseModel):
    untitled_single: str = Field(alias="untitledSingle", json_schema_extra={"enum": ["option1", "option2", "option3"]})
    titled_single: str = Field(
        alias="titledSingle", json_schema_extra={"oneOf": cast(Any, _titled("value1", "value2", "value3"))}
    )
    legacy_enum: str = Field(
        alias="legacyEnum",
        json_schema_extra={"enum": ["opt1", "opt2", "opt3"], "enumNames": ["Option One", "Option Two", "Option Three"]},
    )
    untitled_multi: list[str] = Field(
        alias="untitledMulti",
        json_schema_extra={"items": {"type": "string", "enum": ["option1", "option2", "option3"]}},
    )
    titled_multi: list[str] = Field(
        alias="titledMulti", json_schema_extra={"items": {"anyOf": cast(Any, _titled("value1", "value2", "value3"))}}
    )


def _add_legacy_requests(server: MCPServer[Any]) -> None:
    """What servers may ask of clients until 2025-11-25, and what is deprecated since."""

    @server.tool(description="Logs while it works")
    async def test_tool_with_logging(ctx: Ctx) -> str:
        for line in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await ctx.info(line)
            await asyncio.sleep(0.05)
        return "logged"

    @server.tool(description="Asks the client's model")
    async def test_sampling(prompt: str, ctx: Ctx) -> str:
        message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
        result = await ctx.session.create_message([message], max_tokens=100)
        return f"LLM response: {result.content.text if isinstance(result.content, TextContent) else ''}"

    async def elicited(ctx: Ctx, message: str, schema: type[BaseModel], label: str) -> str:
        result = await ctx.elicit(message, schema)
        content = result.data.model_dump_json(by_alias=True) if result.action == "accept" else "{}"
        return f"{label}: action={result.action}, content={content}"

    @server.tool(description="Asks the user")
    async def test_elicitation(message: str, ctx: Ctx) -> str:
        return await elicited(ctx, message, Contact, "User response")

    @server.tool(description="Asks the user, with defaults")
    async def test_elicitation_sep1034_defaults(ctx: Ctx) -> str:
        return await elicited(ctx, "Please review the defaults", Defaults, "Elicitation completed")

    @server.tool(description="Has the user choose")
    async def test_elicitation_sep1330_enums(ctx: Ctx) -> str:
        return await elicited(ctx, "Please choose", Choices, "Elicitation completed")

    @server.tool(description="Closes the stream in mid-call")
    async def test_reconnection(ctx: Ctx) -> str:
        await ctx.close_sse_stream()
        await asyncio.sleep(0.2)
        return "The call went on while the stream was closed"

    async def accepted(_: ServerRequestContext[Any], __: RequestParams) -> EmptyResult:
        return EmptyResult()

    lowlevel = server._lowlevel_server  # MCPServer itself has no way to add these
    lowlevel.add_request_handler("logging/setLevel", SetLevelRequestParams, accepted)
    lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, accepted)
    lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, accepted)


def _add_stateless(server: MCPServer[Any]) -> None:
    @server.tool(description="Needs a client that offers sampling")
    async def test_missing_capability(ctx: Ctx) -> str:
        if ctx.client_capabilities is None or ctx.client_capabilities.sampling is None:
            needed = {"requiredCapabilities": {"sampling": {}}}
            raise MCPError(MISSING_REQUIRED_CLIENT_CAPABILITY, "This tool needs sampling", needed)
        return "The client offers sampling"

    @server.tool(description="Logs where the client asked for it")
    async def test_logging_tool(ctx: Ctx) -> str:
        await ctx.info("a line for the log")
        return "logged"

    @server.tool(description="Streams, then asks the user")
    async def test_streaming_elicitation(ctx: Ctx) -> str | InputRequiredResult:
        if not ctx.input_responses:
            await ctx.report_progress(1, 2, "about to ask")
            return InputRequiredResult(input_requests={"user_name": NAME})
        return "asked"

    @server.tool(description="Changes the list of tools")
    async def test_trigger_tool_change(ctx: Ctx) -> str:
        await ctx.notify_tools_changed()
        return "changed"

    @server.tool(description="Changes the list of prompts")
    async def test_trigger_prompt_change(ctx: Ctx) -> str:
        await ctx.notify_prompts_changed()
        return "changed"


def _asked(message: str, field: str, kind: str = "string") -> ElicitRequest:
    schema = {"type": "object", "properties": {field: {"type": kind}}, "required": [field]}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def _sampled(prompt: str, max_tokens: int) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=max_tokens))


NAME = _asked("What is your name?", "name")
ROOTS = ListRootsRequest()


def _given(ctx: Ctx, key: str, field: str) -> Any:
    """What the user entered in a field, if the client's answer is one."""
    answer = (ctx.input_responses or {}).get(key)
    return (answer.content or {}).get(field) if isinstance(answer, ElicitResult) else None


def _said(ctx: Ctx, key: str) -> str | None:
    answer = (ctx.input_responses or {}).get(key)
    if isinstance(answer, CreateMessageResult) and isinstance(answer.content, TextContent):
        return answer.content.text
    return None


def _add_input_required(server: MCPServer[Any]) -> None:
    """Since 2026-07-28 a tool that needs something of the client ends with what it needs, and is called again."""

    @server.tool(description="Asks the user for a name")
    async def test_input_required_result_elicitation(ctx: Ctx) -> str | InputRequiredResult:
        name = _given(ctx, "user_name", "name")
        return f"Hello, {name}!" if isinstance(name, str) else InputRequiredResult(input_requests={"user_name": NAME})

    @server.tool(description="Asks the client's model")
    async def test_input_required_result_sampling(ctx: Ctx) -> str | InputRequiredResult:
        question = _sampled("What is the capital of France?", 100)
        return _said(ctx, "capital_question") or InputRequiredResult(input_requests={"capital_question": question})

    @server.tool(description="Asks for the client's roots")
    async def test_input_required_result_list_roots(ctx: Ctx) -> str | InputRequiredResult:
        roots = (ctx.input_responses or {}).get("client_roots")
        if not isinstance(roots, ListRootsResult):
            return InputRequiredResult(input_requests={"client_roots": ROOTS})
        return f"Roots: {', '.join(str(root.uri) for root in roots.roots)}"

    @server.tool(description="Asks for what the client can give, and no more")
    async def test_input_required_result_capabilities(ctx: Ctx) -> str | InputRequiredResult:
        if ctx.input_responses:
            return "thank you"
        can, requests = ctx.client_capabilities, dict[str, InputRequest]()
        if can is not None and can.elicitation is not None:
            requests["user_name"] = NAME
        if can is not None and can.sampling is not None:
            requests["greeting"] = _sampled("Generate a greeting", 50)
        return InputRequiredResult(input_requests=requests) if requests else "nothing can be asked"

    @server.prompt(description="Asks the user for context first")
    async def test_input_required_result_prompt(ctx: Ctx) -> list[UserMessage] | InputRequiredResult:
        context = _given(ctx, "user_context", "context")
        if context is None:
            question = _asked("What context should the prompt use?", "context")
            return InputRequiredResult(input_requests={"user_context": question})
        return [UserMessage(f"Context: {context}")]


def _add_states(server: MCPServer[Any]) -> None:
    """Such a result can carry a state, which comes back with the answers and which nobody may change on the way."""

    @server.tool(description="Keeps a state between two calls")
    async def test_input_required_result_request_state(ctx: Ctx) -> str | InputRequiredResult:
        if ctx.request_state != "asked" or _given(ctx, "confirm", "ok") is None:
            confirm = _asked("Please confirm", "ok", "boolean")
            return InputRequiredResult(input_requests={"confirm": confirm}, request_state="asked")
        return "state-ok"

    @server.tool(description="Asks for three things at once")
    async def test_input_required_result_multiple_inputs(ctx: Ctx) -> str | InputRequiredResult:
        wanted: dict[str, InputRequest] = {
            "user_name": NAME,
            "greeting": _sampled("Generate a greeting", 50),
            "client_roots": ROOTS,
        }
        if not wanted.keys() <= (ctx.input_responses or {}).keys():
            return InputRequiredResult(input_requests=wanted, request_state="asked")
        return f"{_said(ctx, 'greeting')} {_given(ctx, 'user_name', 'name')}"

    @server.tool(description="Asks twice, one after the other")
    async def test_input_required_result_multi_round(ctx: Ctx) -> str | InputRequiredResult:
        if ctx.request_state is None:
            step = _asked("Step 1: What is your name?", "name")
            return InputRequiredResult(input_requests={"step1": step}, request_state="first")
        if ctx.request_state == "first":
            step = _asked("Step 2: What is your favorite color?", "color")
            state = f"second {_given(ctx, 'step1', 'name')}"
            return InputRequiredResult(input_requests={"step2": step}, request_state=state)
        return f"{ctx.request_state.removeprefix('second ')} likes {_given(ctx, 'step2', 'color')}"

    @server.tool(description="Keeps a state that nobody may change")
    async def test_input_required_result_tampered_state(ctx: Ctx) -> str | InputRequiredResult:
        if ctx.request_state is None:
            confirm = _asked("Please confirm", "ok", "boolean")
            return InputRequiredResult(input_requests={"confirm": confirm}, request_state="asked")
        return "state-ok"


SCHEMA_2020_12: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}


def _add_schemas(server: MCPServer[Any]) -> None:
    async def json_schema_2020_12_tool() -> str:
        return "valid"

    tool = Tool.from_function(json_schema_2020_12_tool, description="Has an input schema of many keywords")
    tool.parameters = SCHEMA_2020_12
    server._tool_manager._tools[tool.name] = tool  # its schema is not that of a function

    @server.tool(description="Takes an argument that is also sent as a header")
    async def test_custom_header(
        place: Annotated[str, Field(description="Where", json_schema_extra={"x-mcp-header": "Place"})] = "",
    ) -> str:
        return place


def _add_resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", description="A text", mime_type="text/plain")
    async def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", description="An image", mime_type="image/png")
    async def static_binary() -> bytes:
        return base64.b64decode(PIXEL)

    @server.resource("test://watched-resource", description="A text that can be watched", mime_type="text/plain")
    async def watched() -> str:
        return "Watched."

    @server.resource("test://template/{id}/data", description="A text for each id", mime_type="application/json")
    async def templated(id: str) -> str:
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def _add_prompts(server: MCPServer[Any]) -> None:
    @server.prompt(description="Without arguments")
    async def test_simple_prompt() -> list[UserMessage]:
        return [UserMessage("This is a simple prompt for testing.")]

    @server.prompt(description="With arguments")
    async def test_prompt_with_arguments(
        arg1: Annotated[str, Field(description="First test argument")],
        arg2: Annotated[str, Field(description="Second test argument")],
    ) -> list[UserMessage]:
        return [UserMessage(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'")]

    @server.prompt(description="With a resource in it")
    async def test_prompt_with_embedded_resource(
        resourceUri: Annotated[str, Field(description="URI of the resource to embed")],
    ) -> list[UserMessage]:
        resource = _embedded(resourceUri, "Embedded resource content for testing.", "text/plain")
        return [UserMessage(resource), UserMessage("Please process the embedded resource above.")]

    @server.prompt(description="With an image in it")
    async def test_prompt_with_image() -> list[UserMessage]:
        return [UserMessage(PICTURE), UserMessage("Please analyze the image above.")]
