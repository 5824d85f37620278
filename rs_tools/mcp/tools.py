"""The declared tools over MCP: arguments checked, the answer worded and linked, errors written for the agent."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any, cast

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp.types import CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent, ToolAnnotations
from pydantic import ValidationError, create_model

from rs_tools.declarations import DECLARATIONS, Declaration
from rs_tools.errors import PerceptionError
from rs_tools.mcp.progress import reported
from rs_tools.mcp.schemas import published
from rs_tools.results import Result
from rs_tools.summary import summarize
from rs_tools.tools import Tools

ToolContext = Context[Tools, Any]

READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class DeclaredTool(Tool):
    """A tool whose refusals an agent can act on: the text of a `PerceptionError`, or what its arguments must be."""

    declaration: Declaration

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            match error.__cause__:
                case PerceptionError() as cause:
                    raise ToolError(str(cause)) from cause
                case ValidationError() as cause if type(error) is ToolError:  # else the answer is at fault
                    raise ToolError(self.declaration.refusal(cause.errors())) from cause
            raise


def declared_tools() -> list[Tool]:
    """The eight tools, in the order in which they are declared."""
    return [_tool(declaration) for declaration in DECLARATIONS]


def _tool(declaration: Declaration) -> Tool:
    async def call(ctx: ToolContext, **arguments: Any) -> CallToolResult:
        ask = getattr(ctx.request_context.lifespan_context, declaration.name)
        if not declaration.looks:
            return await _worded(await ask(**arguments))
        async with reported(ctx) as progress:
            return await _worded(await ask(**arguments, progress=progress))

    both = create_model(declaration.arguments.__name__, __base__=(declaration.arguments, ArgModelBase))
    return DeclaredTool(
        fn=call,
        name=declaration.name,
        title=declaration.title,
        description=declaration.description,
        parameters=declaration.input_schema,
        fn_metadata=FuncMetadata(
            arg_model=cast("type[ArgModelBase]", both),
            output_schema=published(declaration),
            output_model=declaration.result,
        ),
        is_async=True,
        context_kwarg="ctx",
        annotations=READ_ONLY,
        declaration=declaration,
    )


async def _worded(result: Result) -> CallToolResult:
    content: list[ContentBlock] = [TextContent(type="text", text=summarize(result))]
    return CallToolResult(
        content=[*content, *await asyncio.to_thread(_files, result)], structured_content=result.model_dump(mode="json")
    )


def _files(result: Result) -> list[ContentBlock]:
    """A link to each file of an answer, and its picture as an image: a link to one cannot be shown by most clients."""
    blocks: list[ContentBlock] = []
    for file in result.artifacts:
        path = Path(file.path)
        if file.kind == "preview":
            picture = base64.b64encode(path.read_bytes()).decode()
            blocks.append(ImageContent(type="image", data=picture, mime_type=file.mime_type))
        else:
            link = ResourceLink(
                type="resource_link", uri=file.uri, name=file.name, mime_type=file.mime_type, size=path.stat().st_size
            )
            blocks.append(link)
    return blocks
