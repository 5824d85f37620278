"""What can be read over MCP beside the answers: the files that answers link to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceNotFoundError

from rs_tools.errors import ArtifactError
from rs_tools.results import MIME_TYPES, SCHEME
from rs_tools.tools import Tools

ResourceContext = Context[Tools, Any]


def add_resources(server: MCPServer[Tools]) -> None:
    for suffix, mime_type in MIME_TYPES.items():
        server.resource(
            f"{SCHEME}://{{name}}{suffix}",
            name=f"artifact{suffix}",
            title=f"File of an answer ({suffix[1:]})",
            description="A file that an answer links to",
            mime_type=mime_type,
        )(_reader(suffix, mime_type))


def _reader(suffix: str, mime_type: str) -> Callable[[str, ResourceContext], Awaitable[str | bytes]]:
    """Reads artifacts of one kind; a file of text as text."""

    async def read(name: str, ctx: ResourceContext) -> str | bytes:
        try:
            content = await ctx.request_context.lifespan_context.read_artifact(f"{SCHEME}://{name}{suffix}")
        except ArtifactError as error:
            raise ResourceNotFoundError(str(error)) from error
        return content.decode() if mime_type.endswith("json") else content

    return read
