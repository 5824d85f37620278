"""Real processes on both sides: `rs-model-server` with a tiny checkpoint, and `rs-mcp` in front of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult, ImageContent, ResourceLink, TextContent

STARTED_S = 300
TOKEN = "token-of-the-tests"  # of the model server

Connect = Callable[..., AbstractAsyncContextManager[Client]]


def text_of(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


def links(result: CallToolResult) -> list[ResourceLink]:
    return [block for block in result.content if isinstance(block, ResourceLink)]


def pictures(result: CallToolResult) -> list[ImageContent]:
    return [block for block in result.content if isinstance(block, ImageContent)]


@dataclass(frozen=True)
class ModelServer:
    url: str
    process: subprocess.Popen[str]


@contextmanager
def running_model_server(weights: Path, token_file: Path) -> Iterator[ModelServer]:
    """`rs-model-server` on a free port, ready to answer; ended on exit."""
    command = [sys.executable, "-m", "model_server.app", "--port", "0", "--weights", str(weights), "--threads", "1"]
    process = subprocess.Popen([*command, "--token-file", str(token_file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        wait_until(lambda: httpx.get(f"{url}/ready", trust_env=False, timeout=STARTED_S).status_code == 200)
        yield ModelServer(url, process)
    finally:
        process.terminate()
        process.wait(STARTED_S)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTED_S
    while not happened():
        assert time.monotonic() < deadline, "the process did not come up"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stdio(*arguments: str, **environment: str) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=["-m", "mcp_server", *arguments], env=environment)
