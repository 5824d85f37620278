"""`langchain-mcp-adapters`, which is built on the SDK's 1.x line: URL TOKEN COMMAND ARGUMENTS..."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from langchain_mcp_adapters.client import MultiServerMCPClient

SCENE = "itaipu_landsat8.tif"


async def main(url: str, token: str, command: str, *arguments: str) -> None:
    http = {"transport": "streamable_http", "url": url, "headers": {"Authorization": f"Bearer {token}"}}
    stdio = {"transport": "stdio", "command": command, "args": list(arguments), "env": dict(os.environ)}
    for name, connection in (("HTTP", http), ("stdio", stdio)):
        connections: Any = {"rs": connection}
        tools = {tool.name: tool for tool in await MultiServerMCPClient(connections).get_tools()}
        assert len(tools) == 8, sorted(tools)

        async def call(tool: str, tools: dict[str, Any] = tools, **inputs: object) -> Any:
            asked = {"type": "tool_call", "id": "1", "name": tool, "args": inputs}
            return await tools[tool].ainvoke(asked)

        facts = await call("inspect_image", image=SCENE)
        assert facts.artifact["structured_content"]["width"] == 560, facts
        covers = await call("segment", image=SCENE, classes=["water"], region=[0, 0, 200, 200])
        assert any(block.get("mime_type") == "application/geo+json" for block in covers.content), covers.content
        refused = await call("inspect_image", image="/etc/passwd")
        assert refused.status == "error", refused
        assert "list_images" in str(refused.content), refused
        print(f"langchain-mcp-adapters over {name}: {len(tools)} tools, answers, links and errors as they should be")


asyncio.run(main(*sys.argv[1:]))
