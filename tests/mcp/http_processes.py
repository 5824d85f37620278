"""`rs-mcp --http` as a process, and clients of it that say who they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_processes import STARTED_S, wait_until

CALL = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@dataclass(frozen=True)
class Service:
    url: str
    log: Path

    def post(self, path: str = "/mcp", *, token: str | None = None, **options: Any) -> httpx.Response:
        """A bare request: a ping, unless `options` of httpx say otherwise."""
        headers = ACCEPT | dict(options.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if not options.keys() & {"json", "content"}:
            options["json"] = CALL
        return httpx.post(self.url + path, headers=headers, trust_env=False, timeout=60, **options)

    def told(self, words: str) -> str:
        """The log, once these words stand in it: a line is written after its request was answered."""
        wait_until(lambda: words in self.log.read_text())
        return self.log.read_text()

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, trust_env=False, timeout=60)

    @asynccontextmanager
    async def client(self, token: str, mode: str = "auto") -> AsyncIterator[Client]:
        """An MCP client with a bearer token. `mode` as of `mcp.Client`."""
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=STARTED_S, trust_env=False) as http,
            Client(streamable_http_client(f"{self.url}/mcp", http_client=http), mode=mode) as client,
        ):
            yield client


@contextmanager
def running_service(folder: Path, *arguments: str) -> Iterator[Service]:
    """`rs-mcp --http` on a port that it is given; its state and its log lie in `folder`."""
    log = folder / "log"
    command = [sys.executable, "-m", "mcp_server", "--http", "--port", "0", *arguments]
    environment = os.environ | {"RS_PERCEPTION_STATE": str(folder / "state")}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env=environment)
    try:
        wait_until(lambda: _address(log) is not None or process.poll() is not None)
        url = _address(log)
        assert url is not None, log.read_text()
        yield Service(url, log)
    finally:
        process.terminate()
        process.wait(STARTED_S)


def _address(log: Path) -> str | None:
    """Where it serves, once it does."""
    said = re.search(r"running on (http://\S+)", log.read_text())
    return said and said[1]
