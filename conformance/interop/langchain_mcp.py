"""`langchain[mcp]`, whose MCPAdapter speaks the newest protocol through FastMCP: URL TOKEN COMMAND ARGUMENTS..."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from langchain.mcp import MCPAdapter

SCENE = "itaipu_landsat8.tif"


async def main(url: str, token: str, command: str, *arguments: str) -> None:
    http = StreamableHttpTransport(url, headers={"Authorization": f"Bearer {token}"})
    stdio = StdioTransport(command, list(arguments), env=dict(os.environ))
    for name, target in (("HTTP", http), ("stdio", stdio)):
        async with MCPAdapter(target) as adapter:
            tools = {tool.name: tool for tool in await adapter.list_tools()}
            assert len(tools) == 8, sorted(tools)

            async def call(tool: str, tools: dict[str, Any] = tools, **inputs: object) -> Any:
                asked = {"type": "tool_call", "id": "1", "name": tool, "args": inputs}
                return await tools[tool].ainvoke(asked)

            facts = await call("inspect_image", image=SCENE)
            assert facts.artifact["structured_content"]["width"] == 560, facts
            covers = await call("segment", image=SCENE, classes=["water"], region=[0, 0, 200, 200])
            assert "application/geo+json" in str(covers.content), covers.content
            refused = await call("inspect_image", image="/etc/passwd")
            assert refused.status == "error", refused
            assert "list_images" in str(refused.content), refused
        print(f"langchain[mcp] over {name}: {len(tools)} tools, answers, links and errors as they should be")


asyncio.run(main(*sys.argv[1:]))
